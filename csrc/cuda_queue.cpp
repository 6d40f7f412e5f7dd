#include "cuda_queue.h"

#include <chrono>
#include <limits>
#include <map>
#include <thread>

namespace dwdp::cuda {
namespace {

Address address_of(const void* pointer) {
  return static_cast<Address>(reinterpret_cast<std::uintptr_t>(pointer));
}

Address operator+(Address address, std::size_t num_bytes) {
  return static_cast<Address>(static_cast<std::uint64_t>(address) + num_bytes);
}

// Slices of a run follow each other, in order, whatever lies between them.
std::vector<Run> runs_of(const Slice* slices, std::size_t num_slices) {
  std::vector<Run> runs;
  std::map<Address, std::size_t> ending;  // by the address at which a run's destination ends
  for (const Slice* slice = slices; slice != slices + num_slices; ++slice) {
    const Run next = {address_of(slice->destination), address_of(slice->source), slice->num_bytes};
    const auto found = ending.find(next.destination);
    std::size_t index = runs.size();
    if (found != ending.end() &&
        runs[found->second].source + runs[found->second].num_bytes == next.source) {
      index = found->second;
      ending.erase(found);
      runs[index].num_bytes += next.num_bytes;
    } else {
      runs.push_back(next);
    }
    ending[runs[index].destination + runs[index].num_bytes] = index;
  }
  return runs;
}

}  // namespace

// The driver calls this from a thread of its own.
void Delays::sleep(void* delays) {
  auto* self = static_cast<Delays*>(delays);
  std::uint64_t mixed = self->state_.fetch_add(0x9e3779b97f4a7c15, std::memory_order_relaxed);
  mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111eb;
  std::this_thread::sleep_for(std::chrono::microseconds((mixed ^ (mixed >> 31)) % self->max_us_));
}

CopyQueue::CopyQueue(int ordinal, const QueueOptions& options)
    : context_(ordinal),
      ordinal_(ordinal),
      poison_(options.poison),
      delays_(options.max_delay_us, options.seed) {
  const Current current(context_);
  int lowest, highest;
  driver().priority_range(&lowest, &highest);
  driver().stream_create(&stream_, kStreamNonBlocking, highest);
}

std::string CopyQueue::close() noexcept {
  std::string failures;
  if (stream_ == nullptr) return failures;
  driver().context_push.note(failures, context_.handle());
  driver().stream_synchronize.note(failures, stream_);
  for (const Batch& batch : batches_)
    for (Event event :
         {batch.ready, batch.consumed, batch.captured_consumed, batch.captured_ready})
      if (event != nullptr) driver().event_destroy.note(failures, event);
  driver().stream_destroy.note(failures, stream_);
  Context popped;
  driver().context_pop.note(failures, &popped);
  stream_ = nullptr;
  batches_.clear();
  const std::string context = context_.close();
  return failures + (failures.empty() || context.empty() ? "" : "; ") + context;
}

// Both events are recorded at once: waiting for one that never was is a silent no-op.
Batch* CopyQueue::add_batch(const Slice* slices, const std::size_t* wave_sizes,
                            std::size_t num_waves) {
  const Current current(context_);
  Batch& batch = batches_.emplace_back();
  const Slice* next = slices;
  for (std::size_t wave = 0; wave < num_waves; ++wave) {
    batch.waves.emplace_back();
    for (std::size_t index = 0; index < wave_sizes[wave]; ++index) add_copy(batch, *next++);
  }
  batch.runs = runs_of(slices, static_cast<std::size_t>(next - slices));
  for (Event* event :
       {&batch.ready, &batch.consumed, &batch.captured_consumed, &batch.captured_ready})
    driver().event_create(event, kEventDisableTiming);
  driver().event_record(batch.ready, stream_);
  driver().event_record(batch.consumed, stream_);
  return &batch;
}

// A copy from another device, or from the host, belongs on a copy engine, beside the kernels. From
// CUDA 13.1 on the same flag takes copies within a device off its multiprocessors, many times slower.
void CopyQueue::add_copy(Batch& batch, const Slice& slice) {
  Wave& wave = batch.waves.back();
  const Address source = address_of(slice.source);
  const unsigned flags = lies_here(source) ? 0 : kPreferOverlapWithCompute;
  if (wave.attributes.empty() || wave.attributes.back().flags != flags) {
    CopyAttributes attributes = {};
    attributes.source_order = kSourceInStreamOrder;
    attributes.flags = flags;
    wave.attributes.push_back(attributes);
    wave.first.push_back(wave.sizes.size());
  }
  wave.destinations.push_back(address_of(slice.destination));
  wave.sources.push_back(source);
  wave.sizes.push_back(slice.num_bytes);
  ++num_copies_;
  num_overlapping_ += flags != 0;
}

// What the driver does not know is not of this device.
bool CopyQueue::lies_here(Address address) const {
  unsigned kind = 0;
  int ordinal = -1;
  return driver().pointer_attribute.attempt(&kind, kPointerMemoryType, address) == kSuccess &&
         kind == kMemoryTypeDevice &&
         driver().pointer_attribute.attempt(&ordinal, kPointerDeviceOrdinal, address) == kSuccess &&
         ordinal == ordinal_;
}

int CopyQueue::driver_version() const {
  int version = 0;
  driver().version(&version);
  return version;
}

void CopyQueue::issue(Batch* batch, const Batch* after) {
  const Current current(context_);
  if (is_capturing(stream_))
    throw CudaError(
        "the copy stream is part of a graph that is being captured, from which these copies would be "
        "missing: use capture_fill, or issue before the capture or after it");
  if (after != nullptr) driver().stream_wait_event(stream_, after->consumed, 0);
  spoil(batch);
  for (const Wave& wave : batch->waves) copy_wave(wave);
  driver().event_record(batch->ready, stream_);
}

void CopyQueue::wait(const Batch* batch, Stream compute) {
  const Current current(context_);
  driver().stream_wait_event(compute, batch->ready, 0);
}

void CopyQueue::record(const Batch* batch, Stream compute) {
  const Current current(context_);
  driver().event_record(batch->consumed, compute);
}

// Asking an event is refused while a stream of the process captures, unless this thread is relaxed.
bool CopyQueue::is_done(const Batch* batch) const {
  const Current current(context_);
  int mode = kCaptureModeRelaxed;
  driver().exchange_capture_mode(&mode);
  const Result result = driver().event_query.attempt(batch->ready);
  driver().exchange_capture_mode(&mode);
  if (result != kSuccess && result != kNotReady)
    throw CudaError(describe("cuEventQuery(" + text(batch->ready) + ")", result), result);
  return result == kSuccess;
}

void CopyQueue::drain() {
  const Current current(context_);
  driver().stream_synchronize(stream_);
}

void CopyQueue::capture_record(Batch* batch, Stream compute) {
  const Current current(context_);
  const std::uint64_t capture = capture_of(compute, "marking a consumed slot in a graph");
  driver().event_record(batch->captured_consumed, compute);
  batch->captured_in = capture;
}

// The copy stream joins the capture at `after`'s point and is joined again: the capture must end
// with no loose stream. Copies of several fills keep the order of the copy stream.
void CopyQueue::capture_fill(const Batch* batch, const Batch* after, Stream compute) {
  const Current current(context_);
  if (after->captured_in != capture_of(compute, "filling a slot in a graph"))
    throw CudaError(
        "a fill can only be captured after a layer that was consumed in the same capture: "
        "call capture_record for it first");
  driver().stream_wait_event(stream_, after->captured_consumed, 0);
  spoil(batch);
  for (const Run& run : batch->runs)
    driver().copy_async(run.destination, run.source, run.num_bytes, stream_);
  driver().event_record(batch->captured_ready, stream_);
  driver().stream_wait_event(compute, batch->captured_ready, 0);
}

bool CopyQueue::is_capturing(Stream stream) const {
  const Current current(context_);
  int status = kCaptureNone;
  driver().capture_info(stream, &status, nullptr, nullptr, nullptr, nullptr);
  return status != kCaptureNone;
}

std::uint64_t CopyQueue::capture_of(Stream stream, const char* action) const {
  int status = kCaptureNone;
  std::uint64_t capture = 0;
  driver().capture_info(stream, &status, &capture, nullptr, nullptr, nullptr);
  if (status == kCaptureActive) return capture;
  throw CudaError(std::string(action) + ": stream " + text(stream) +
                  (status == kCaptureNone ? " is not capturing"
                                          : " has a capture that an earlier error invalidated"));
}

void CopyQueue::spoil(const Batch* batch) {
  if (poison_)
    for (const Run& run : batch->runs)
      driver().set_async(run.destination, 0xff, run.num_bytes, stream_);
  if (delays_.enabled()) driver().launch_host_function(stream_, &Delays::sleep, &delays_);
}

void CopyQueue::copy_wave(const Wave& wave) {
  const std::size_t num_copies = wave.sizes.size();
  if (num_copies == 0) return;
  if (!uses_batch_copy()) {
    for (std::size_t index = 0; index < num_copies; ++index)
      driver().copy_async(wave.destinations[index], wave.sources[index], wave.sizes[index],
                          stream_);
    return;
  }
  std::size_t failed = std::numeric_limits<std::size_t>::max();
  const Result result = driver().copy_batch_async.attempt(
      const_cast<Address*>(wave.destinations.data()), const_cast<Address*>(wave.sources.data()),
      const_cast<std::size_t*>(wave.sizes.data()), num_copies,
      const_cast<CopyAttributes*>(wave.attributes.data()),
      const_cast<std::size_t*>(wave.first.data()), wave.attributes.size(), &failed, stream_);
  if (result == kSuccess) return;
  std::string call = "cuMemcpyBatchAsync(" + text(num_copies) + " copies, " + text(stream_) + ")";
  if (failed < num_copies)
    call += ", copy " + text(failed) + " (" + text(wave.destinations[failed]) + ", " +
            text(wave.sources[failed]) + ", " + text(wave.sizes[failed]) + "),";
  throw CudaError(describe(call, result), result);
}

}  // namespace dwdp::cuda

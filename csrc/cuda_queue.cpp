#include "cuda_queue.h"

#include <chrono>
#include <limits>
#include <thread>

namespace dwdp::cuda {

// The driver calls this from a thread of its own.
void Delays::sleep(void* delays) {
  auto* self = static_cast<Delays*>(delays);
  std::uint64_t mixed = self->state_.fetch_add(0x9e3779b97f4a7c15, std::memory_order_relaxed);
  mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111eb;
  std::this_thread::sleep_for(std::chrono::microseconds((mixed ^ (mixed >> 31)) % self->max_us_));
}

CopyQueue::CopyQueue(int ordinal, const QueueOptions& options)
    : context_(ordinal), poison_(options.poison), delays_(options.max_delay_us, options.seed) {
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
Batch* CopyQueue::add_batch(const Slice* slices, std::size_t num_slices) {
  const Current current(context_);
  Batch& batch = batches_.emplace_back();
  for (std::size_t index = 0; index < num_slices; ++index) {
    batch.destinations.push_back(
        static_cast<Address>(reinterpret_cast<std::uintptr_t>(slices[index].destination)));
    batch.sources.push_back(
        static_cast<Address>(reinterpret_cast<std::uintptr_t>(slices[index].source)));
    batch.sizes.push_back(slices[index].num_bytes);
  }
  for (Event* event :
       {&batch.ready, &batch.consumed, &batch.captured_consumed, &batch.captured_ready})
    driver().event_create(event, kEventDisableTiming);
  driver().event_record(batch.ready, stream_);
  driver().event_record(batch.consumed, stream_);
  return &batch;
}

void CopyQueue::issue(Batch* batch, const Batch* after) {
  const Current current(context_);
  if (after != nullptr) driver().stream_wait_event(stream_, after->consumed, 0);
  spoil(batch);
  if (uses_batch_copy())
    copy_as_batch(batch);
  else
    copy_one_by_one(batch);
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

void CopyQueue::wait_external(const Batch* batch, Stream compute) {
  const Current current(context_);
  driver().stream_wait_event(compute, batch->ready, kEventExternal);
}

void CopyQueue::record_external(const Batch* batch, Stream compute) {
  const Current current(context_);
  driver().event_record_with_flags(batch->consumed, compute, kEventExternal);
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
  copy_one_by_one(batch);
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
    for (std::size_t index = 0; index < batch->sizes.size(); ++index)
      driver().set_async(batch->destinations[index], 0xff, batch->sizes[index], stream_);
  if (delays_.enabled()) driver().launch_host_function(stream_, &Delays::sleep, &delays_);
}

void CopyQueue::copy_as_batch(const Batch* batch) {
  const std::size_t num_slices = batch->sizes.size();
  if (num_slices == 0) return;
  CopyAttributes attributes = {};
  attributes.source_order = kSourceInStreamOrder;
  attributes.flags = kPreferOverlapWithCompute;
  std::size_t first = 0;  // the attributes hold from this slice on
  std::size_t failed = std::numeric_limits<std::size_t>::max();
  const Result result = driver().copy_batch_async.attempt(
      const_cast<Address*>(batch->destinations.data()), const_cast<Address*>(batch->sources.data()),
      const_cast<std::size_t*>(batch->sizes.data()), num_slices, &attributes, &first, 1, &failed,
      stream_);
  if (result == kSuccess) return;
  std::string call = "cuMemcpyBatchAsync(" + text(num_slices) + " copies, " + text(stream_) + ")";
  if (failed < num_slices)
    call += ", copy " + text(failed) + " (" + text(batch->destinations[failed]) + ", " +
            text(batch->sources[failed]) + ", " + text(batch->sizes[failed]) + "),";
  throw CudaError(describe(call, result), result);
}

void CopyQueue::copy_one_by_one(const Batch* batch) {
  for (std::size_t index = 0; index < batch->sizes.size(); ++index)
    driver().copy_async(batch->destinations[index], batch->sources[index], batch->sizes[index],
                        stream_);
}

}  // namespace dwdp::cuda

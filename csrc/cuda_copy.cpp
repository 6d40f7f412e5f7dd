#include "cuda_copy.h"

#include <cstdio>

namespace dwdp::cuda {
namespace {

constexpr unsigned kNonBlocking = 1;    // CU_STREAM_NON_BLOCKING
constexpr unsigned kDisableTiming = 2;  // CU_EVENT_DISABLE_TIMING

std::string hex(const void* address) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", address);
  return text;
}

}  // namespace

class CopyQueue::Current {
 public:
  explicit Current(const CopyQueue& queue) : driver_(queue.driver_) {
    driver_.check(driver_.context_push(queue.context_), "cuCtxPushCurrent");
  }
  ~Current() {
    Context popped;
    driver_.context_pop(&popped);
  }

 private:
  const Driver& driver_;
};

CopyQueue::CopyQueue(int ordinal) : driver_(Driver::get()) {
  driver_.check(driver_.device_get(&device_, ordinal), "cuDeviceGet(" + std::to_string(ordinal) + ")");
  driver_.check(driver_.primary_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
  try {
    const Current current(*this);
    driver_.check(driver_.stream_create(&stream_, kNonBlocking, 0), "cuStreamCreateWithPriority");
  } catch (...) {
    driver_.primary_release(device_);
    throw;
  }
}

CopyQueue::~CopyQueue() { destroy(); }

void CopyQueue::destroy() noexcept {
  if (driver_.context_push(context_) == 0) {
    driver_.stream_synchronize(stream_);
    for (Batch& batch : batches_) {
      if (batch.ready != nullptr) driver_.event_destroy(batch.ready);
      if (batch.consumed != nullptr) driver_.event_destroy(batch.consumed);
    }
    driver_.stream_destroy(stream_);
    Context popped;
    driver_.context_pop(&popped);
  }
  driver_.primary_release(device_);
}

// Both events are recorded at once: waiting for one that never was is a silent no-op.
Batch* CopyQueue::add_batch(const Slice* slices, std::size_t num_slices) {
  const Current current(*this);
  Batch& batch = batches_.emplace_back();
  batch.slices.assign(slices, slices + num_slices);
  for (Event* event : {&batch.ready, &batch.consumed}) {
    driver_.check(driver_.event_create(event, kDisableTiming), "cuEventCreate");
    driver_.check(driver_.event_record(*event, stream_), "cuEventRecord");
  }
  return &batch;
}

void CopyQueue::issue(Batch* batch) {
  const Current current(*this);
  for (const Slice& slice : batch->slices) {
    const Result result = driver_.copy_async(reinterpret_cast<Pointer>(slice.destination),
                                             reinterpret_cast<Pointer>(slice.source),
                                             slice.num_bytes, stream_);
    if (result != 0)
      driver_.check(result, "cuMemcpyAsync(" + hex(slice.destination) + ", " + hex(slice.source) +
                                ", " + std::to_string(slice.num_bytes) + ")");
  }
  driver_.check(driver_.event_record(batch->ready, stream_), "cuEventRecord(ready)");
}

void CopyQueue::wait(Batch* batch, Stream compute) {
  driver_.check(driver_.stream_wait_event(compute, batch->ready, 0), "cuStreamWaitEvent(ready)");
}

void CopyQueue::consume(Batch* batch, Stream compute) {
  driver_.check(driver_.event_record(batch->consumed, compute), "cuEventRecord(consumed)");
  driver_.check(driver_.stream_wait_event(stream_, batch->consumed, 0),
                "cuStreamWaitEvent(consumed)");
}

void CopyQueue::drain() {
  const Current current(*this);
  driver_.check(driver_.stream_synchronize(stream_), "cuStreamSynchronize");
}

}  // namespace dwdp::cuda

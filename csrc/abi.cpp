// The C ABI that `vllm_dwdp/native.py` calls through ctypes. Bump the version with every change.
#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>

#include "cuda_copy.h"
#include "host_copy.h"

#define DWDP_API extern "C" __attribute__((visibility("default")))

namespace {
thread_local std::string last_error;

// Runs `action`; 0, or -1 with `last_error` set.
template <typename Action>
int guarded(Action action) {
  try {
    action();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}
}  // namespace

DWDP_API int dwdp_abi_version() { return 2; }

DWDP_API const char* dwdp_last_error() { return last_error.c_str(); }

// A queue with its threads, or null with `dwdp_last_error` set.
DWDP_API void* dwdp_queue_create(unsigned num_threads, const int* cpus, unsigned poison,
                                 unsigned max_delay_us, std::uint64_t seed) {
  try {
    return new dwdp::CopyQueue({num_threads, cpus, poison, max_delay_us, seed});
  } catch (const std::exception& error) {
    last_error = error.what();
    return nullptr;
  }
}

// Finishes what was issued, then ends the threads.
DWDP_API void dwdp_queue_destroy(void* queue) { delete static_cast<dwdp::CopyQueue*>(queue); }

// Registers slices (copied); the batch lives as long as the queue.
DWDP_API void* dwdp_queue_add_batch(void* queue, const dwdp::Slice* slices,
                                    std::size_t num_slices) {
  try {
    return static_cast<dwdp::CopyQueue*>(queue)->add_batch(slices, num_slices);
  } catch (const std::exception& error) {
    last_error = error.what();
    return nullptr;
  }
}

DWDP_API void dwdp_queue_issue(void* queue, void* batch) {
  static_cast<dwdp::CopyQueue*>(queue)->issue(static_cast<dwdp::Batch*>(batch));
}

DWDP_API void dwdp_queue_drain(void* queue) { static_cast<dwdp::CopyQueue*>(queue)->drain(); }

DWDP_API std::uint64_t dwdp_queue_busy_ns(void* queue) {
  return static_cast<dwdp::CopyQueue*>(queue)->busy_ns();
}

// Sleeps until every fill issued so far is complete; returns the seconds slept.
DWDP_API double dwdp_batch_wait(void* batch) {
  auto* typed = static_cast<dwdp::Batch*>(batch);
  return typed->event.wait(typed->issued);
}

DWDP_API int dwdp_batch_done(void* batch) {
  auto* typed = static_cast<dwdp::Batch*>(batch);
  return typed->event.reached(typed->issued) ? 1 : 0;
}

DWDP_API void dwdp_stream_copy(void* destination, const void* source, std::size_t num_bytes) {
  dwdp::stream_copy(destination, source, num_bytes);
}

// --- the CUDA device: the same queue on a stream; addresses are device addresses -----------------

DWDP_API void* dwdp_cuda_queue_create(int ordinal) {
  void* queue = nullptr;
  guarded([&] { queue = new dwdp::cuda::CopyQueue(ordinal); });
  return queue;
}

DWDP_API void dwdp_cuda_queue_destroy(void* queue) {
  delete static_cast<dwdp::cuda::CopyQueue*>(queue);
}

DWDP_API void* dwdp_cuda_queue_add_batch(void* queue, const dwdp::Slice* slices,
                                         std::size_t num_slices) {
  void* batch = nullptr;
  guarded([&] {
    batch = static_cast<dwdp::cuda::CopyQueue*>(queue)->add_batch(slices, num_slices);
  });
  return batch;
}

DWDP_API int dwdp_cuda_queue_issue(void* queue, void* batch) {
  return guarded([&] {
    static_cast<dwdp::cuda::CopyQueue*>(queue)->issue(static_cast<dwdp::cuda::Batch*>(batch));
  });
}

// `stream` computes: it waits for the batch's last fill.
DWDP_API int dwdp_cuda_queue_wait(void* queue, void* batch, void* stream) {
  return guarded([&] {
    static_cast<dwdp::cuda::CopyQueue*>(queue)->wait(static_cast<dwdp::cuda::Batch*>(batch), stream);
  });
}

// The batch's slot is free once `stream` has done what it was given so far.
DWDP_API int dwdp_cuda_queue_consume(void* queue, void* batch, void* stream) {
  return guarded([&] {
    static_cast<dwdp::cuda::CopyQueue*>(queue)->consume(static_cast<dwdp::cuda::Batch*>(batch),
                                                        stream);
  });
}

DWDP_API int dwdp_cuda_queue_drain(void* queue) {
  return guarded([&] { static_cast<dwdp::cuda::CopyQueue*>(queue)->drain(); });
}

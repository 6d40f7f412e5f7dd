// The C ABI that `vllm_dwdp/device/native.py` calls through ctypes. Bump the version with every change,
// also of `cuda_abi.cpp`.
#include "abi.h"

#include <cstddef>
#include <cstdint>

#include "digest.h"
#include "host_copy.h"

std::string& dwdp::abi::last_error() {
  thread_local std::string message;
  return message;
}

DWDP_API int dwdp_abi_version() { return 6; }

DWDP_API const char* dwdp_last_error() { return dwdp::abi::last_error().c_str(); }

// A queue with its threads, or null with `dwdp_last_error` set.
DWDP_API void* dwdp_queue_create(unsigned num_threads, const int* cpus, unsigned poison,
                                 unsigned max_delay_us, std::uint64_t seed) {
  void* queue = nullptr;
  dwdp::abi::guarded([&] {
    queue = new dwdp::CopyQueue({num_threads, cpus, poison, max_delay_us, seed});
  });
  return queue;
}

// Finishes what was issued, then ends the threads.
DWDP_API void dwdp_queue_destroy(void* queue) { delete static_cast<dwdp::CopyQueue*>(queue); }

// Registers slices (copied); the batch lives as long as the queue.
DWDP_API void* dwdp_queue_add_batch(void* queue, const dwdp::Slice* slices,
                                    std::size_t num_slices) {
  void* batch = nullptr;
  dwdp::abi::guarded([&] {
    batch = static_cast<dwdp::CopyQueue*>(queue)->add_batch(slices, num_slices);
  });
  return batch;
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

// As `dwdp::sum_pieces`.
DWDP_API void dwdp_sum_pieces(const std::uint64_t* words, std::size_t num_words,
                              const std::uint64_t* keys, std::size_t piece_words,
                              std::uint64_t* sums) {
  dwdp::sum_pieces(words, num_words, keys, piece_words, sums);
}

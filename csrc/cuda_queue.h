// The copy queue of the CUDA device: one stream of its own, ready and consumed events per batch.
//
// The host only enqueues; streams wait for each other.
//
//   compute stream   ... | wait(ready[l]) kernels of l record(consumed[l]) | ...
//   copy stream                wait(consumed[l]) copies of l+2 record(ready[l+2])
//
// While the compute stream captures a graph, `capture_record` and `capture_fill` put the copies into
// the graph, as a branch beside what was captured in between:
//
//   compute stream   kernels of l . capture_record(l) . attention, l+1 ... . kernels of l+2
//                                          \__ copies of l+2 (capture_fill) __/
//
// `wait_external` and `record_external` are nodes that touch the same two events at each replay. Rings
// do not use them (`transfer/graph_ring.py` says why); they are here to be measured.
//
// One thread drives a queue. A captured graph must not be launched once the queue is closed.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "cuda_device.h"
#include "host_copy.h"

namespace dwdp::cuda {

struct Batch {
  std::vector<Address> destinations;
  std::vector<Address> sources;
  std::vector<std::size_t> sizes;
  Event ready = nullptr;     // its copies are done
  Event consumed = nullptr;  // its slot may be overwritten
  // Internal to one capture: the same two, as points of the graph.
  Event captured_consumed = nullptr;
  Event captured_ready = nullptr;
  std::uint64_t captured_in = 0;  // the capture in which `captured_consumed` was recorded
};

struct QueueOptions {
  bool poison;            // overwrite a slot with 0xff before each fill
  unsigned max_delay_us;  // sleep up to this long, on the copy stream, before each fill
  std::uint64_t seed;     // of the delays
};

// Sleeps on the copy stream, as a host function: for provoking races.
class Delays {
 public:
  Delays(unsigned max_us, std::uint64_t seed) : max_us_(max_us), state_(seed) {}
  bool enabled() const { return max_us_ != 0; }
  static void sleep(void* delays);

 private:
  const unsigned max_us_;
  std::atomic<std::uint64_t> state_;
};

class CopyQueue {
 public:
  CopyQueue(int ordinal, const QueueOptions& options);
  ~CopyQueue() { close(); }
  CopyQueue(const CopyQueue&) = delete;
  CopyQueue& operator=(const CopyQueue&) = delete;

  Batch* add_batch(const Slice* slices, std::size_t num_slices);
  void issue(Batch* batch, const Batch* after);  // once `after`, if any, is consumed
  void wait(const Batch* batch, Stream compute);
  void record(const Batch* batch, Stream compute);
  bool is_done(const Batch* batch) const;
  void drain();

  // While `compute` is capturing.
  void wait_external(const Batch* batch, Stream compute);
  void record_external(const Batch* batch, Stream compute);
  void capture_record(Batch* batch, Stream compute);
  void capture_fill(const Batch* batch, const Batch* after, Stream compute);
  bool is_capturing(Stream stream) const;

  bool uses_batch_copy() const { return static_cast<bool>(driver().copy_batch_async); }
  // Waits for the copies and frees everything; what failed on the way, empty if nothing did.
  std::string close() noexcept;

 private:
  const Driver& driver() const { return context_.driver(); }
  std::uint64_t capture_of(Stream stream, const char* action) const;  // throws if there is none
  void spoil(const Batch* batch);  // poison and delay
  void copy_as_batch(const Batch* batch);
  void copy_one_by_one(const Batch* batch);

  PrimaryContext context_;
  const bool poison_;
  Delays delays_;
  Stream stream_ = nullptr;
  std::deque<Batch> batches_;
};

}  // namespace dwdp::cuda

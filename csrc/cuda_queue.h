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
// A batch is copied wave by wave, each wave by one batch call: the copies of a call have no order, calls
// of one stream have. A graph holds one node for each run of bytes instead, whatever it was cut into.
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

// Copies without an order, as the batch call takes them.
struct Wave {
  std::vector<Address> destinations;
  std::vector<Address> sources;
  std::vector<std::size_t> sizes;
  std::vector<CopyAttributes> attributes;  // attributes[k] hold from copy first[k] on
  std::vector<std::size_t> first;
};

// Bytes that are contiguous on both sides.
struct Run {
  Address destination;
  Address source;
  std::size_t num_bytes;
};

struct Batch {
  std::vector<Wave> waves;
  std::vector<Run> runs;     // the same bytes, uncut
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

  // Wave `w` is `wave_sizes[w]` slices, one wave after the other.
  Batch* add_batch(const Slice* slices, const std::size_t* wave_sizes, std::size_t num_waves);
  // Starts once `after`, if any, is consumed. Refused while the copy stream is part of a capture.
  void issue(Batch* batch, const Batch* after);
  void wait(const Batch* batch, Stream compute);
  void record(const Batch* batch, Stream compute);
  bool is_done(const Batch* batch) const;
  void drain();

  // While `compute` is capturing.
  void capture_record(Batch* batch, Stream compute);
  void capture_fill(const Batch* batch, const Batch* after, Stream compute);
  bool is_capturing(Stream stream) const;

  bool uses_batch_copy() const { return static_cast<bool>(driver().copy_batch_async); }
  int driver_version() const;  // of CUDA, as 1000 * major + 10 * minor
  // Copies of all batches, and those of them that ask to be kept off the multiprocessors.
  std::size_t num_copies() const { return num_copies_; }
  std::size_t num_overlapping() const { return num_overlapping_; }
  // Waits for the copies and frees everything; what failed on the way, empty if nothing did.
  std::string close() noexcept;

 private:
  const Driver& driver() const { return context_.driver(); }
  std::uint64_t capture_of(Stream stream, const char* action) const;  // throws if there is none
  void spoil(const Batch* batch);  // poison and delay
  bool lies_here(Address address) const;  // on this queue's device
  void add_copy(Batch& batch, const Slice& slice);
  void copy_wave(const Wave& wave);

  PrimaryContext context_;
  const int ordinal_;
  const bool poison_;
  Delays delays_;
  Stream stream_ = nullptr;
  std::deque<Batch> batches_;
  std::size_t num_copies_ = 0, num_overlapping_ = 0;
};

}  // namespace dwdp::cuda

// Copies between host addresses in native threads.
//
// A queue owns its threads. A batch is a list of slices with one event, all registered once; issuing
// a batch costs one lock and no allocation. Threads take slices in order, so the slices of a batch
// rotate over the peers as they were planned. Nothing here knows of Python; every function may be
// called without the GIL.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

namespace dwdp {

struct Slice {
  void* destination;
  const void* source;
  std::size_t num_bytes;
};

// Completion of a fill. The count of finished fills only grows; a waiter sleeps on a futex.
class Event {
 public:
  void complete();
  // Returns once `count` fills are complete; the seconds it slept, 0 if it did not have to.
  double wait(std::uint32_t count);
  bool reached(std::uint32_t count) const;

 private:
  std::atomic<std::uint32_t> completed_{0};
  std::atomic<std::uint32_t> sleepers_{0};
};

struct Batch {
  std::vector<Slice> slices;
  Event event;
  std::atomic<std::size_t> remaining{0};  // slices of the running fill not copied yet
  std::uint32_t issued = 0;               // fills issued so far; written by the issuing thread only
};

struct Options {
  unsigned num_threads;
  const int* cpus;  // one per thread, or null
  unsigned poison;  // overwrite a slot with 0xff before each fill
  unsigned max_delay_us;  // sleep up to this long before each slice
  std::uint64_t seed;     // of the delays
};

class CopyQueue {
 public:
  explicit CopyQueue(const Options& options);
  ~CopyQueue();
  CopyQueue(const CopyQueue&) = delete;
  CopyQueue& operator=(const CopyQueue&) = delete;

  Batch* add_batch(const Slice* slices, std::size_t num_slices);
  void issue(Batch* batch);  // at most one fill of a batch at a time
  void drain();              // returns when nothing is queued or running
  std::uint64_t busy_ns() const { return busy_ns_.load(std::memory_order_relaxed); }

 private:
  struct Cursor {
    Batch* batch;
    std::size_t next;
  };
  void run(unsigned index);
  bool take(Batch** batch, Slice* slice);  // the next slice, sleeping for it; false to stop
  void wake_one();
  void copy(const Slice& slice, std::mt19937_64& random);

  const Options options_;
  std::vector<int> cpus_;
  std::mutex mutex_;
  std::atomic<std::uint32_t> signal_{0};    // changes whenever a sleeping thread should look again
  std::atomic<std::uint32_t> sleepers_{0};  // threads asleep, or about to be
  std::condition_variable idle_;
  std::deque<Cursor> pending_;
  std::deque<Batch> batches_;
  std::size_t running_ = 0;
  bool stopping_ = false;
  std::atomic<std::uint64_t> busy_ns_{0};
  std::vector<std::thread> threads_;
};

// memcpy with streaming stores where the CPU has them: a slot is read once, much later, so it must
// not push the running layer out of the caches.
void stream_copy(void* destination, const void* source, std::size_t num_bytes);

}  // namespace dwdp

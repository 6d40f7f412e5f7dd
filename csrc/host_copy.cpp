#include "host_copy.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>
#include <cstring>
#include <ctime>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dwdp {
namespace {

using Clock = std::chrono::steady_clock;

long futex(std::atomic<std::uint32_t>* word, int operation, std::uint32_t value) {
  return syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(word), operation | FUTEX_PRIVATE_FLAG,
                 value, nullptr, nullptr, 0);
}

// Counts wrap; fills are compared as distances.
bool at_least(std::uint32_t completed, std::uint32_t count) {
  return static_cast<std::int32_t>(completed - count) >= 0;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void stream_copy_avx2(char* destination, const char* source,
                                                      std::size_t num_bytes) {
  const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(destination) & 31;
  if (misaligned != 0) {
    const std::size_t head = 32 - misaligned;
    std::memcpy(destination, source, head);
    destination += head;
    source += head;
    num_bytes -= head;
  }
  for (; num_bytes >= 128; num_bytes -= 128, destination += 128, source += 128) {
    const auto* from = reinterpret_cast<const __m256i*>(source);
    auto* to = reinterpret_cast<__m256i*>(destination);
    const __m256i a = _mm256_loadu_si256(from);
    const __m256i b = _mm256_loadu_si256(from + 1);
    const __m256i c = _mm256_loadu_si256(from + 2);
    const __m256i d = _mm256_loadu_si256(from + 3);
    _mm256_stream_si256(to, a);
    _mm256_stream_si256(to + 1, b);
    _mm256_stream_si256(to + 2, c);
    _mm256_stream_si256(to + 3, d);
  }
  _mm_sfence();  // streaming stores are weakly ordered; the event must not overtake them
  std::memcpy(destination, source, num_bytes);
}
#endif

}  // namespace

void stream_copy(void* destination, const void* source, std::size_t num_bytes) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2 && num_bytes >= 256) {
    stream_copy_avx2(static_cast<char*>(destination), static_cast<const char*>(source), num_bytes);
    return;
  }
#endif
  std::memcpy(destination, source, num_bytes);
}

void Event::complete() {
  completed_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) futex(&completed_, FUTEX_WAKE, INT_MAX);
}

bool Event::reached(std::uint32_t count) const {
  return at_least(completed_.load(std::memory_order_acquire), count);
}

double Event::wait(std::uint32_t count) {
  if (reached(count)) return 0.0;
  const auto started = Clock::now();
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  // Never spin: on a small host the copy needs the very core that would spin.
  for (;;) {
    const std::uint32_t seen = completed_.load(std::memory_order_seq_cst);
    if (at_least(seen, count)) break;
    futex(&completed_, FUTEX_WAIT, seen);
  }
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  return std::chrono::duration<double>(Clock::now() - started).count();
}

CopyQueue::CopyQueue(const Options& options) : options_(options) {
  if (options.cpus != nullptr) cpus_.assign(options.cpus, options.cpus + options.num_threads);
  for (unsigned index = 0; index < options.num_threads; ++index)
    threads_.emplace_back(&CopyQueue::run, this, index);
}

CopyQueue::~CopyQueue() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  signal_.fetch_add(1, std::memory_order_seq_cst);
  futex(&signal_, FUTEX_WAKE, INT_MAX);
  for (std::thread& thread : threads_) thread.join();
}

Batch* CopyQueue::add_batch(const Slice* slices, std::size_t num_slices) {
  std::lock_guard<std::mutex> lock(mutex_);
  Batch& batch = batches_.emplace_back();
  batch.slices.assign(slices, slices + num_slices);
  return &batch;
}

void CopyQueue::issue(Batch* batch) {
  ++batch->issued;
  if (batch->slices.empty()) {
    batch->event.complete();
    return;
  }
  batch->remaining.store(batch->slices.size(), std::memory_order_relaxed);
  if (options_.poison != 0)
    for (const Slice& slice : batch->slices) std::memset(slice.destination, 0xff, slice.num_bytes);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    pending_.push_back({batch, 0});
  }
  wake_one();
}

// The host pays for one wake-up; a thread that finds more work than its own slice wakes the next.
void CopyQueue::wake_one() {
  signal_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) futex(&signal_, FUTEX_WAKE, 1);
}

void CopyQueue::drain() {
  std::unique_lock<std::mutex> lock(mutex_);
  idle_.wait(lock, [this] { return pending_.empty() && running_ == 0; });
}

void CopyQueue::run(unsigned index) {
  pthread_setname_np(pthread_self(), "dwdp-copy");
  if (index < cpus_.size()) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpus_[index], &set);
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
  }
  std::mt19937_64 random(options_.seed + index);
  Batch* batch;
  Slice slice;
  while (take(&batch, &slice)) {
    copy(slice, random);
    if (batch->remaining.fetch_sub(1, std::memory_order_acq_rel) == 1) batch->event.complete();
    std::lock_guard<std::mutex> lock(mutex_);
    if (--running_ == 0 && pending_.empty()) idle_.notify_all();
  }
}

bool CopyQueue::take(Batch** batch, Slice* slice) {
  for (;;) {
    const std::uint32_t seen = signal_.load(std::memory_order_seq_cst);
    bool more = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!pending_.empty()) {
        Cursor& front = pending_.front();
        *batch = front.batch;
        *slice = front.batch->slices[front.next++];
        if (front.next == front.batch->slices.size()) pending_.pop_front();
        ++running_;
        more = !pending_.empty();
      } else if (stopping_) {
        return false;
      } else {
        *batch = nullptr;
      }
    }
    if (*batch != nullptr) {
      if (more && options_.num_threads > 1) wake_one();
      return true;
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    futex(&signal_, FUTEX_WAIT, seen);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }
}

void CopyQueue::copy(const Slice& slice, std::mt19937_64& random) {
  if (options_.max_delay_us != 0)
    std::this_thread::sleep_for(std::chrono::microseconds(random() % options_.max_delay_us));
  const auto started = Clock::now();
  stream_copy(slice.destination, slice.source, slice.num_bytes);
  busy_ns_.fetch_add(
      std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - started).count(),
      std::memory_order_relaxed);
}

}  // namespace dwdp

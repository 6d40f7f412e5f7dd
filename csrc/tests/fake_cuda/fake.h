// A fake libcuda.so.1, for tests only. NOT A GPU: what runs here says nothing about hardware.
//
// It keeps the rules of the driver API reference on host memory, so that the wrapper, the exchange
// of descriptors and the order of streams, events and graphs can be executed where no GPU is. Where
// the reference leaves room, it takes the stricter reading. Device addresses are host addresses,
// streams are threads, allocations are memfds.
//
// Environment, read once; `dwdp_fake_cuda_set` changes a setting later, by its name in lower case:
//   DWDP_FAKE_CUDA_DEVICES       devices (2)
//   DWDP_FAKE_CUDA_MEMORY_MIB    memory of each (4096)
//   DWDP_FAKE_CUDA_VERSION       driver version; before 12080 there is no batch copy (13000). Our
//                                wrapper looks functions up once, so set it by the environment
//   DWDP_FAKE_CUDA_FABRIC        1: fabric handles can be made (0)
//   DWDP_FAKE_CUDA_POSIX         0: file descriptors cannot be made; 1: not imported; 2: both work (2)
//   DWDP_FAKE_CUDA_COMBINED      0: no allocation has handles of both kinds (1)
//   DWDP_FAKE_CUDA_FABRIC_GRANULARITY_MIB  of allocations with fabric handles (2)
//   DWDP_FAKE_CUDA_READ_ONLY     0: read-only access is refused (1)
//   DWDP_FAKE_CUDA_MIXED_ACCESS  in ranges over own and imported memory: 0: no access to the imported;
//                                1: only in a call for each allocation; 2: also in one call (2)
//   DWDP_FAKE_CUDA_PEER_MAPPINGS mappings of imported memory that fit the device (1000000). That a map
//                                beyond them is out of memory is a guess: no reference says
//   DWDP_FAKE_CUDA_MAX_DELAY_US  sleep up to this long before each operation (0)
//   DWDP_FAKE_CUDA_SEED          of the delays (0)
//   DWDP_FAKE_CUDA_QUEUE_DEPTH   a call returns once fewer operations of its stream are pending; each
//                                copy of a batch is one, and 1 is a driver that runs every call at once
//                                (0: any number)
//   DWDP_FAKE_CUDA_STALL_MS      a host that waits this long while nothing ends is told of a time-out,
//                                and so is every later one: what was pending is given up (20000)
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#define FAKE_API extern "C" __attribute__((visibility("default")))

namespace fake {

using Result = int;

constexpr Result kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3,
                 kInvalidDevice = 101, kInvalidContext = 201, kInvalidHandle = 400,
                 kIllegalState = 401, kNotReady = 600, kIllegalAddress = 700, kLaunchTimeout = 702,
                 kNotPermitted = 800, kNotSupported = 801, kCaptureUnsupported = 900, kCaptureInvalidated = 901,
                 kCaptureMerge = 902, kCaptureUnmatched = 903, kCaptureUnjoined = 904,
                 kCaptureIsolation = 905, kCaptureImplicit = 906, kCapturedEvent = 907,
                 kCaptureWrongThread = 908;

struct Failure {
  Result result;
};

inline void require(bool condition, Result result) {
  if (!condition) throw Failure{result};
}

// Atomic: threads of streams read what the host may set.
struct Settings {
  std::atomic<int> num_devices, version;
  std::atomic<std::size_t> memory_bytes;
  std::atomic<bool> fabric, combined, read_only;
  std::atomic<int> posix, mixed_access;
  std::atomic<std::size_t> fabric_granularity, peer_mappings, queue_depth;
  std::atomic<unsigned> max_delay_us, stall_ms;
  std::atomic<std::uint64_t> random;  // the state of the delays
};
const Settings& settings();
void pause();  // a random delay

// Protects everything but the queues of the streams. Never held while waiting for work.
std::mutex& state_mutex();
using Lock = std::unique_lock<std::mutex>;

void wait_for_room();  // in the stream that this thread gave an operation last

// The status of `action`, run under the lock; `Failure` becomes a status.
template <typename Action>
Result api(Action action) {
  try {
    {
      Lock lock(state_mutex());
      action(lock);
    }
    wait_for_room();
    return kSuccess;
  } catch (const Failure& failure) {
    return failure.result;
  }
}

void require_context();  // cuInit was called and a context is current in this thread

// Something that will be over: an operation, the work before a recorded event.
class Completion {
 public:
  void finish();
  void wait();         // on a thread of a stream
  void wait_as_host();  // throws if nothing ends any more; not under the lock
  bool finished();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool finished_ = false;
};
using CompletionPtr = std::shared_ptr<Completion>;

struct Capture;
struct Event {
  CompletionPtr recorded;            // null: never recorded
  std::shared_ptr<Capture> capture;  // the last record was in this capture ...
  std::set<std::size_t> nodes;       // ... after these nodes
};

struct Node {
  std::function<void()> work;
  std::set<std::size_t> after;
};
struct Graph {
  std::vector<Node> nodes;
};
struct Executable {
  Graph graph;
  CompletionPtr last_launch;
};

class Stream;
struct Capture {
  std::uint64_t id;
  int mode;
  std::thread::id thread;
  Stream* origin;
  std::set<Stream*> members;
  Graph graph;
  bool invalidated = false;
  bool ended = false;
};

struct Operation {
  std::vector<CompletionPtr> after;
  std::function<void()> work;
  CompletionPtr done;
  std::size_t num_pending;  // as how many it counts
};

// A first-in first-out queue with a thread of its own.
class Stream {
 public:
  explicit Stream(bool blocking);
  void push(Operation operation);
  void stop();  // after the last operation; the thread ends by itself

  const bool blocking;  // ordered with the legacy stream
  CompletionPtr tail;   // of the last operation; null at first
  std::shared_ptr<Capture> capture;
  std::set<std::size_t> tip;  // what the next captured node depends on

  struct Queue {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Operation> operations;
    std::size_t num_pending = 0;  // queued or running
    bool stopping = false;
  };
  const std::shared_ptr<Queue>& queue() const { return queue_; }

 private:
  static void run(const std::shared_ptr<Queue>& queue);
  std::shared_ptr<Queue> queue_;
};

// What lives, to be compared by tests and at the end of a context.
struct Live {
  std::size_t handles, mappings, reservations, streams, events, graphs;
};
Live live();

// What this process asked of the driver, to be compared by tests.
struct Counts {
  std::size_t copies;              // of one call each, also captured ones
  std::size_t batch_calls;
  std::size_t batch_copies;        // of all batch calls
  std::size_t overlapping_copies;  // of these, with the flag to overlap with compute
  std::size_t graph_nodes;         // of the graph that was captured last
};
Counts& counts();  // under the lock

// streams.cpp
Stream& stream_of(void* handle);  // 0 and 1 are the legacy stream
Event& event_of(void* handle);
CompletionPtr enqueue(Stream& stream, std::function<void()> work,
                      std::vector<CompletionPtr> after = {}, std::size_t num_pending = 1);
void note_progress();  // an operation or a node has ended
bool given_up();       // nothing ended for too long: whatever is pending is dropped
void submit(Stream& stream, std::function<void()> work);  // captures it if the stream captures
void wait_for_everything(Lock& lock);                     // gives the lock away meanwhile
void count_streams(Live& live);
void fail_later(Result result);  // an asynchronous error: returned by every later synchronisation
Result late_failure();

// graphs.cpp
void forbid_during_capture();  // for calls that stream capture calls potentially unsafe
void invalidate(Capture& capture);
bool wait_in_capture(Stream& stream, Event& event);    // false: not capturing
bool record_in_capture(Stream& stream, Event& event);  // the same
void add_node(Stream& stream, Node node);
std::size_t num_graphs();

// memory.cpp
void count_memory(Live& live);
bool accessible(const void* address, std::size_t num_bytes, bool write);
void copy(void* destination, const void* source, std::size_t num_bytes);  // checked, when it runs
bool write_word(void* address, std::uint32_t value);          // false, and an error later: no access
bool read_word(const void* address, std::uint32_t* value);    // the same

}  // namespace fake

// The fake driver's streams, events and copies. NOT A GPU.
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>

#include "fake.h"

namespace fake {
namespace {

std::set<Stream*>& streams() {
  static auto* streams = new std::set<Stream*>;
  return *streams;
}

std::set<Event*>& events() {
  static auto* events = new std::set<Event*>;
  return *events;
}

Stream& legacy() {
  static auto* stream = new Stream(true);
  return *stream;
}

std::atomic<Result> failure{kSuccess};
std::atomic<std::uint64_t> num_ended{0};
thread_local std::shared_ptr<Stream::Queue> given_to;  // this thread's last operation
constexpr std::chrono::milliseconds kLook{20};

// Throws once nothing has ended for the time that a stall takes.
class Patience {
 public:
  void check() {
    const auto now = std::chrono::steady_clock::now();
    if (const std::uint64_t ended = num_ended; ended != seen_) {
      seen_ = ended;
      since_ = now;
    }
    if (!given_up() && now - since_ < std::chrono::milliseconds(settings().stall_ms)) return;
    if (!given_up())
      std::fprintf(stderr, "fake CUDA: the host and every stream wait: given up after %u ms\n",
                   settings().stall_ms.load());
    fail_later(kLaunchTimeout);
    throw Failure{kLaunchTimeout};
  }

 private:
  std::uint64_t seen_ = num_ended;
  std::chrono::steady_clock::time_point since_ = std::chrono::steady_clock::now();
};

}  // namespace

void note_progress() { ++num_ended; }
bool given_up() { return failure == kLaunchTimeout; }

void Completion::finish() {
  std::lock_guard<std::mutex> lock(mutex_);
  finished_ = true;
  changed_.notify_all();
}

void Completion::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!changed_.wait_for(lock, kLook, [this] { return finished_ || given_up(); })) {
  }
}

void Completion::wait_as_host() {
  Patience patience;
  std::unique_lock<std::mutex> lock(mutex_);
  while (!changed_.wait_for(lock, kLook, [this] { return finished_; })) patience.check();
}

bool Completion::finished() {
  std::lock_guard<std::mutex> lock(mutex_);
  return finished_;
}

Stream::Stream(bool blocking) : blocking(blocking), queue_(std::make_shared<Queue>()) {
  std::thread(&Stream::run, queue_).detach();
}

void Stream::push(Operation operation) {
  std::lock_guard<std::mutex> lock(queue_->mutex);
  queue_->num_pending += operation.num_pending;
  queue_->operations.push_back(std::move(operation));
  queue_->changed.notify_all();
}

void Stream::stop() {
  std::lock_guard<std::mutex> lock(queue_->mutex);
  queue_->stopping = true;
  queue_->changed.notify_all();
}

void Stream::run(const std::shared_ptr<Queue>& queue) {
  for (;;) {
    Operation operation;
    {
      std::unique_lock<std::mutex> lock(queue->mutex);
      queue->changed.wait(lock, [&] { return !queue->operations.empty() || queue->stopping; });
      if (queue->operations.empty()) return;
      operation = std::move(queue->operations.front());
      queue->operations.pop_front();
    }
    for (const CompletionPtr& before : operation.after) before->wait();
    pause();
    if (!given_up()) operation.work();
    operation.done->finish();
    note_progress();
    std::lock_guard<std::mutex> lock(queue->mutex);
    queue->num_pending -= operation.num_pending;
    queue->changed.notify_all();
  }
}

void wait_for_room() {
  const std::shared_ptr<Stream::Queue> queue = std::move(given_to);
  given_to.reset();
  const std::size_t depth = settings().queue_depth;
  if (queue == nullptr || depth == 0) return;
  Patience patience;
  std::unique_lock<std::mutex> lock(queue->mutex);
  while (!queue->changed.wait_for(lock, kLook, [&] { return queue->num_pending < depth; }))
    patience.check();
}

Stream& stream_of(void* handle) {
  require_context();
  if (reinterpret_cast<std::uintptr_t>(handle) <= 1) {
    for (Stream* stream : streams())
      require(!stream->blocking || !stream->capture, kCaptureImplicit);
    return legacy();
  }
  const auto found = streams().find(static_cast<Stream*>(handle));
  require(found != streams().end(), kInvalidHandle);
  return **found;
}

Event& event_of(void* handle) {
  require_context();
  const auto found = events().find(static_cast<Event*>(handle));
  require(found != events().end(), kInvalidHandle);
  return **found;
}

// The legacy stream waits for all blocking streams, and they for it.
CompletionPtr enqueue(Stream& stream, std::function<void()> work,
                      std::vector<CompletionPtr> after, std::size_t num_pending) {
  if (&stream == &legacy()) {
    for (Stream* other : streams())
      if (other->blocking && other->tail) after.push_back(other->tail);
  } else if (stream.blocking && legacy().tail) {
    after.push_back(legacy().tail);
  }
  stream.tail = std::make_shared<Completion>();
  stream.push({std::move(after), std::move(work), stream.tail, num_pending});
  given_to = stream.queue();
  return stream.tail;
}

void submit(Stream& stream, std::function<void()> work) {
  if (stream.capture)
    add_node(stream, {std::move(work), {}});
  else
    enqueue(stream, std::move(work));
}

void wait_for_everything(Lock& lock) {
  std::vector<CompletionPtr> tails = {legacy().tail};
  for (Stream* stream : streams()) tails.push_back(stream->tail);
  lock.unlock();
  for (const CompletionPtr& tail : tails)
    if (tail) tail->wait_as_host();
  lock.lock();
}

void count_streams(Live& live) {
  live.streams = streams().size();
  live.events = events().size();
}

void fail_later(Result result) { failure = result; }
Result late_failure() { return failure; }

}  // namespace fake

using namespace fake;

namespace {

// Blocking copies go through the legacy stream.
Result copy_now(void* destination, const void* source, std::size_t num_bytes) {
  return api([&](Lock& lock) {
    Stream& stream = stream_of(nullptr);
    forbid_during_capture();
    const CompletionPtr done = enqueue(stream, [=] { copy(destination, source, num_bytes); });
    lock.unlock();
    done->wait_as_host();
    lock.lock();
    require(late_failure() == kSuccess, late_failure());
  });
}

struct CopyAttributes {
  int source_order;
  int hints[4];
  unsigned flags;
};

Result copy_batch(void** destinations, void** sources, std::size_t* sizes, std::size_t count,
                  CopyAttributes* attributes, std::size_t* first, std::size_t num_attributes,
                  std::size_t* failed, void* handle) {
  return api([&](Lock&) {
    Stream& stream = stream_of(handle);
    require(reinterpret_cast<std::uintptr_t>(handle) > 1, kInvalidValue);
    require(!stream.capture, kCaptureUnsupported);  // the capture goes on, without the copies
    require(count > 0 && num_attributes > 0 && first[0] == 0, kInvalidValue);
    for (std::size_t each = 0; each < num_attributes; ++each) {
      const std::size_t end = each + 1 < num_attributes ? first[each + 1] : count;
      require(first[each] < end && end <= count, kInvalidValue);
      const CopyAttributes& held = attributes[each];
      require(held.source_order >= 1 && held.source_order <= 3 && held.flags <= 1, kInvalidValue);
      if (held.flags == 1) counts().overlapping_copies += end - first[each];
    }
    ++counts().batch_calls;
    counts().batch_copies += count;
    struct Copy {
      void *destination, *source;
      std::size_t num_bytes;
    };
    std::vector<Copy> copies;
    for (std::size_t index = 0; index < count; ++index) {
      *failed = index;
      require(destinations[index] != nullptr && sources[index] != nullptr, kInvalidValue);
      copies.push_back({destinations[index], sources[index], sizes[index]});
    }
    static std::mt19937 random;  // the copies of a batch have no order
    std::shuffle(copies.begin(), copies.end(), random);
    const auto work = [copies] {
      for (const Copy& each : copies) {
        pause();
        copy(each.destination, each.source, each.num_bytes);
      }
    };
    enqueue(stream, work, {}, copies.size());
  });
}

}  // namespace

FAKE_API Result cuGetProcAddress(const char* name, void** function, int version, std::uint64_t) {
  *function = nullptr;
  if (version > settings().version) return kInvalidValue;
  const bool batch = std::strcmp(name, "cuMemcpyBatchAsync") == 0;
  if (batch && version >= 12080 && version < 13000)
    *function = reinterpret_cast<void*>(&copy_batch);
  return kSuccess;
}

FAKE_API Result cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
  return api([&](Lock&) {
    require_context();
    require(flags <= 1 && priority <= 0 && priority >= -5, kInvalidValue);
    auto* created = new Stream(flags == 0);
    streams().insert(created);
    *stream = created;
  });
}

FAKE_API Result cuStreamCreate(void** stream, unsigned flags) {
  return cuStreamCreateWithPriority(stream, flags, 0);
}

FAKE_API Result cuStreamDestroy_v2(void* handle) {
  return api([&](Lock&) {
    Stream& stream = stream_of(handle);
    require(&stream != &legacy(), kInvalidHandle);
    require(!stream.capture, kCaptureUnsupported);
    streams().erase(&stream);
    stream.stop();
    delete &stream;
  });
}

FAKE_API Result cuStreamSynchronize(void* handle) {
  return api([&](Lock& lock) {
    Stream& stream = stream_of(handle);
    if (stream.capture) {
      invalidate(*stream.capture);
      throw Failure{kCaptureUnsupported};
    }
    forbid_during_capture();
    // Ordered like an operation, so that the legacy stream waits for all that it must.
    const CompletionPtr done = enqueue(stream, [] {});
    lock.unlock();
    done->wait_as_host();
    lock.lock();
    require(late_failure() == kSuccess, late_failure());
  });
}

FAKE_API Result cuStreamWaitEvent(void* handle, void* event_handle, unsigned flags) {
  return api([&](Lock&) {
    Stream& stream = stream_of(handle);
    Event& event = event_of(event_handle);
    require(flags == 0, kInvalidValue);  // external nodes are not played
    if (wait_in_capture(stream, event)) return;
    if (event.recorded) enqueue(stream, [] {}, {event.recorded});
  });
}

FAKE_API Result cuEventRecord(void* event_handle, void* handle) {
  return api([&](Lock&) {
    Stream& stream = stream_of(handle);
    Event& event = event_of(event_handle);
    if (record_in_capture(stream, event)) return;
    event.capture.reset();
    event.recorded = enqueue(stream, [] {});
  });
}

FAKE_API Result cuEventCreate(void** event, unsigned flags) {
  return api([&](Lock&) {
    require_context();
    require(flags <= 7, kInvalidValue);
    auto* created = new Event;
    events().insert(created);
    *event = created;
  });
}

FAKE_API Result cuEventDestroy_v2(void* handle) {
  return api([&](Lock&) {
    Event& event = event_of(handle);
    events().erase(&event);
    delete &event;
  });
}

FAKE_API Result cuEventQuery(void* handle) {
  return api([&](Lock&) {
    const Event& event = event_of(handle);
    require(!event.capture, kCapturedEvent);
    forbid_during_capture();
    require(late_failure() == kSuccess, late_failure());
    require(!event.recorded || event.recorded->finished(), kNotReady);
  });
}

FAKE_API Result cuMemcpyAsync(void* destination, const void* source, std::size_t num_bytes,
                              void* handle) {
  return api([&](Lock&) {
    require(destination != nullptr && source != nullptr, kInvalidValue);
    ++counts().copies;
    submit(stream_of(handle), [=] { copy(destination, source, num_bytes); });
  });
}

FAKE_API Result cuMemsetD8Async(void* destination, unsigned char value, std::size_t num_bytes,
                                void* handle) {
  return api([&](Lock&) {
    require(destination != nullptr, kInvalidValue);
    submit(stream_of(handle), [=] {
      const std::vector<unsigned char> bytes(num_bytes, value);
      copy(destination, bytes.data(), num_bytes);
    });
  });
}

// A stream, or a node of a graph, goes on once the word is at least `value`; waits are polled.
FAKE_API Result cuStreamWaitValue32_v2(void* handle, void* address, std::uint32_t value,
                                       unsigned flags) {
  return api([&](Lock&) {
    require(flags == 0 && reinterpret_cast<std::uintptr_t>(address) % 4 == 0, kInvalidValue);
    submit(stream_of(handle), [=] {
      std::uint32_t seen = 0;
      while (read_word(address, &seen) && static_cast<std::int32_t>(seen - value) < 0)
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    });
  });
}

FAKE_API Result cuStreamWriteValue32_v2(void* handle, void* address, std::uint32_t value,
                                        unsigned flags) {
  return api([&](Lock&) {
    require(flags == 0 && reinterpret_cast<std::uintptr_t>(address) % 4 == 0, kInvalidValue);
    submit(stream_of(handle), [=] { write_word(address, value); });
  });
}

FAKE_API Result cuLaunchHostFunc(void* handle, void (*function)(void*), void* argument) {
  return api([&](Lock&) { submit(stream_of(handle), [=] { function(argument); }); });
}

FAKE_API Result cuMemcpyDtoD_v2(void* destination, void* source, std::size_t num_bytes) {
  return copy_now(destination, source, num_bytes);
}

FAKE_API Result cuMemcpyDtoH_v2(void* destination, void* source, std::size_t num_bytes) {
  return copy_now(destination, source, num_bytes);
}

FAKE_API Result cuMemcpyHtoD_v2(void* destination, const void* source, std::size_t num_bytes) {
  return copy_now(destination, source, num_bytes);
}

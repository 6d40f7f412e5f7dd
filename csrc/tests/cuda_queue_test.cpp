// The CUDA wrapper over the fake driver, for the sanitizers: memory, the ring in eager steps, between
// graphs and inside one, with poison and delays. NO EVIDENCE ABOUT HARDWARE.
#include "../cuda_queue.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

using namespace dwdp::cuda;

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);     \
      std::exit(1);                                                            \
    }                                                                          \
  } while (0)

constexpr std::size_t kNumLayers = 6, kLayerBytes = 10'000, kRangeBytes = 4 << 20;

Address operator+(Address address, std::size_t num_bytes) {
  return static_cast<Address>(static_cast<std::uint64_t>(address) + num_bytes);
}

// A stream whose kernels are copies, and the graphs it captures.
class Compute {
 public:
  Compute() : context_(0), driver_(context_.driver()), current_(context_) {
    driver_.stream_create(&stream_, kStreamNonBlocking, 0);
  }
  ~Compute() {
    driver_.stream_synchronize(stream_);
    for (void* graph : graphs_) destroy_(graph);
    driver_.stream_destroy(stream_);
  }

  Stream stream() const { return stream_; }
  void copy(Address destination, Address source, std::size_t num_bytes) {
    driver_.copy_async(destination, source, num_bytes, stream_);
  }
  void begin() { begin_(stream_, 0); }
  void* end() {
    void *graph, *executable;
    end_(stream_, &graph);
    instantiate_(&executable, graph, 0);
    destroy_graph_(graph);
    graphs_.push_back(executable);
    return executable;
  }
  void launch(void* graph) { launch_(graph, stream_); }
  void synchronize() { driver_.stream_synchronize(stream_); }

 private:
  const Library library_;
  const PrimaryContext context_;
  const Driver& driver_;
  const Current current_;
  const Entry<Stream, int> begin_{library_, "cuStreamBeginCapture_v2"};
  const Entry<Stream, void**> end_{library_, "cuStreamEndCapture"};
  const Entry<void**, void*, unsigned long long> instantiate_{library_,
                                                              "cuGraphInstantiateWithFlags"};
  const Entry<void*, Stream> launch_{library_, "cuGraphLaunch"};
  const Entry<void*> destroy_{library_, "cuGraphExecDestroy"};
  const Entry<void*> destroy_graph_{library_, "cuGraphDestroy"};
  Stream stream_ = nullptr;
  std::vector<void*> graphs_;
};

// Two allocations in one range.
class Range {
 public:
  explicit Range(const Device& device) : device_(device), address_(device.reserve(kRangeBytes)) {
    for (int half = 0; half < 2; ++half) {
      const Allocation allocation = device.create(kRangeBytes / 2, kHandlePosixFd);
      device.map(address_ + half * kRangeBytes / 2, kRangeBytes / 2, allocation);
      device.release(allocation);
    }
    device.set_access(address_, kRangeBytes, true);
  }
  ~Range() {
    for (int half = 0; half < 2; ++half)
      device_.unmap(address_ + half * kRangeBytes / 2, kRangeBytes / 2);
    device_.free_address(address_, kRangeBytes);
  }
  Address address() const { return address_; }

 private:
  const Device& device_;
  const Address address_;
};

struct Ring {
  Ring(const Device& device, CopyQueue& queue, Address address)
      : device(device), queue(queue), slots(address + kNumLayers * kLayerBytes),
        outputs(slots + 2 * kLayerBytes) {
    for (std::size_t layer = 0; layer < kNumLayers; ++layer) {
      const std::vector<char> content(kLayerBytes, static_cast<char>(layer + 1));
      device.write(address + layer * kLayerBytes, content.data(), kLayerBytes);
      std::vector<dwdp::Slice> slices;
      std::vector<std::size_t> waves;
      for (std::size_t start = 0; start < kLayerBytes; start += 3'000) {
        waves.push_back(1);
        slices.push_back({reinterpret_cast<void*>(slot(layer) + start),
                          reinterpret_cast<void*>(address + layer * kLayerBytes + start),
                          std::min<std::size_t>(3'000, kLayerBytes - start)});
      }
      batches.push_back(queue.add_batch(slices.data(), waves.data(), waves.size()));
      CHECK(batches.back()->waves.size() == 4 && batches.back()->runs.size() == 1);
    }
    queue.issue(batches[0], nullptr);
    queue.issue(batches[1], nullptr);
  }
  Address slot(std::size_t layer) const { return slots + layer % 2 * kLayerBytes; }
  void consume(std::size_t layer, Compute& compute) const {
    compute.copy(outputs + layer * kLayerBytes, slot(layer), kLayerBytes);
  }
  void refill(std::size_t layer) {
    queue.issue(batches[(layer + 2) % kNumLayers], batches[layer]);
  }
  void check() const {
    std::vector<char> seen(kNumLayers * kLayerBytes), expected(kLayerBytes);
    device.read(seen.data(), outputs, seen.size());
    for (std::size_t layer = 0; layer < kNumLayers; ++layer) {
      std::memset(expected.data(), static_cast<int>(layer + 1), kLayerBytes);
      CHECK(std::memcmp(seen.data() + layer * kLayerBytes, expected.data(), kLayerBytes) == 0);
    }
    std::memset(seen.data(), 0, seen.size());
    device.write(outputs, seen.data(), seen.size());
  }

  const Device& device;
  CopyQueue& queue;
  const Address slots, outputs;
  std::vector<Batch*> batches;
};

void eager_step(Ring& ring, Compute& compute) {
  for (std::size_t layer = 0; layer < kNumLayers; ++layer) {
    ring.queue.wait(ring.batches[layer], compute.stream());
    ring.consume(layer, compute);
    ring.queue.record(ring.batches[layer], compute.stream());
    ring.refill(layer);
  }
}

std::vector<void*> capture_pieces(Ring& ring, Compute& compute) {
  std::vector<void*> pieces;
  for (std::size_t layer = 0; layer < kNumLayers; ++layer) {
    if (layer % 2 == 0) compute.begin();
    ring.consume(layer, compute);
    if (layer % 2 == 1) pieces.push_back(compute.end());
  }
  return pieces;
}

void refuse_to_issue(Ring& ring) {
  bool refused = false;
  try {
    ring.queue.issue(ring.batches[0], nullptr);
  } catch (const CudaError& error) {
    refused = std::strstr(error.what(), "part of a graph that is being captured") != nullptr;
  }
  CHECK(refused);
}

void* capture_full(Ring& ring, Compute& compute) {
  CopyQueue& queue = ring.queue;
  compute.begin();
  for (std::size_t layer = 0; layer < kNumLayers; ++layer) {
    Batch* batch = ring.batches[layer];
    if (layer >= 2) queue.capture_fill(batch, ring.batches[layer - 2], compute.stream());
    ring.consume(layer, compute);
    queue.capture_record(batch, compute.stream());
    if (layer == 3) refuse_to_issue(ring);
  }
  return compute.end();
}

// Waits before a graph for what it needs, and refills behind it what it leaves.
void launch(void* graph, Ring& ring, Compute& compute, std::size_t needs, std::size_t leaves) {
  for (std::size_t layer : {needs, needs + 1})
    ring.queue.wait(ring.batches[layer], compute.stream());
  compute.launch(graph);
  for (std::size_t layer : {leaves, leaves + 1}) {
    ring.queue.record(ring.batches[layer], compute.stream());
    ring.refill(layer);
  }
}

void ring(unsigned max_delay_us, std::uint64_t seed) {
  Device device(0);
  {
    const Range range(device);
    CopyQueue queue(0, {true, max_delay_us, seed});
    Compute compute;
    Ring ring(device, queue, range.address());
    const std::vector<void*> pieces = capture_pieces(ring, compute);
    void* full = capture_full(ring, compute);
    for (int step = 0; step < 5; ++step) {
      eager_step(ring, compute);
      if (step % 2 == 0) compute.synchronize(), ring.check();
      for (std::size_t piece = 0; piece < pieces.size(); ++piece)
        launch(pieces[piece], ring, compute, 2 * piece, 2 * piece);
      if (step % 2 == 0) compute.synchronize(), ring.check();
      launch(full, ring, compute, 0, kNumLayers - 2);
      if (step % 2 == 0) compute.synchronize(), ring.check();
    }
    compute.synchronize();
    queue.drain();
    CHECK(queue.is_done(ring.batches[0]));
    CHECK(queue.close().empty());
  }
  CHECK(device.close().empty());  // the fake driver refuses while anything is alive
}

void errors() {
  Device device(0);
  bool caught = false;
  try {
    device.create(1, kHandleNone);
  } catch (const CudaError& error) {
    caught = error.result() == 1 && std::strstr(error.what(), "cuMemCreate(_, 1, ") != nullptr;
  }
  CHECK(caught);
}

}  // namespace

int main() {
  errors();
  ring(0, 1);
  ring(300, 2);
  std::puts("ok");
}

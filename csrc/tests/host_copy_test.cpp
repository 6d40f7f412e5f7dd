// Stress of the copy queue for the sanitizers: a ring of two slots driven as the pipeline drives it,
// with poison and delays, several queues at once, events waited for from several threads.
#include "../host_copy.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);     \
      std::exit(1);                                                            \
    }                                                                          \
  } while (0)

std::vector<dwdp::Slice> slices_of(std::vector<char>& slot, const std::vector<char>& layer,
                                   std::size_t slice_bytes) {
  std::vector<dwdp::Slice> slices;
  for (std::size_t start = 0; start < layer.size(); start += slice_bytes)
    slices.push_back({slot.data() + start, layer.data() + start,
                      std::min(slice_bytes, layer.size() - start)});
  return slices;
}

// Layer i fills slot i % 2; every layer must find its own bytes, whatever the delays.
void ring(unsigned num_threads, unsigned max_delay_us, unsigned seed) {
  constexpr std::size_t num_layers = 5, layer_bytes = 20'000;
  std::vector<std::vector<char>> layers;
  for (std::size_t layer = 0; layer < num_layers; ++layer)
    layers.emplace_back(layer_bytes, static_cast<char>(layer + 1));
  std::vector<char> slots[2] = {std::vector<char>(layer_bytes), std::vector<char>(layer_bytes)};
  dwdp::CopyQueue queue({num_threads, nullptr, 1, max_delay_us, seed});
  std::vector<dwdp::Batch*> batches;
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    auto slices = slices_of(slots[layer % 2], layers[layer], 3'000);
    batches.push_back(queue.add_batch(slices.data(), slices.size()));
  }
  queue.issue(batches[0]);
  queue.issue(batches[1]);
  for (int step = 0; step < 40; ++step)
    for (std::size_t layer = 0; layer < num_layers; ++layer) {
      dwdp::Batch* batch = batches[layer];
      batch->event.wait(batch->issued);
      CHECK(std::memcmp(slots[layer % 2].data(), layers[layer].data(), layer_bytes) == 0);
      queue.issue(batches[layer + 2 < num_layers ? layer + 2 : layer % 2]);
    }
  queue.drain();
  CHECK(queue.busy_ns() > 0);
}

void waiters() {
  std::vector<char> source(1 << 16, 'x'), target(1 << 16);
  dwdp::CopyQueue queue({2, nullptr, 0, 200, 7});
  auto slices = slices_of(target, source, 1 << 12);
  dwdp::Batch* batch = queue.add_batch(slices.data(), slices.size());
  for (int fill = 1; fill <= 20; ++fill) {
    queue.issue(batch);
    std::vector<std::thread> threads;
    for (int index = 0; index < 3; ++index)
      threads.emplace_back([batch, fill] { batch->event.wait(static_cast<std::uint32_t>(fill)); });
    for (std::thread& thread : threads) thread.join();
    CHECK(batch->event.reached(static_cast<std::uint32_t>(fill)));
  }
}

void destroyed_while_busy() {
  std::vector<char> source(1 << 20, 'y'), target(1 << 20);
  {
    dwdp::CopyQueue queue({3, nullptr, 0, 50, 1});
    auto slices = slices_of(target, source, 1 << 14);
    queue.issue(queue.add_batch(slices.data(), slices.size()));
  }
  CHECK(target == source);
}

void any_alignment() {
  std::vector<char> source(2'000), target(2'100);
  for (std::size_t index = 0; index < source.size(); ++index) source[index] = char(index * 7);
  for (std::size_t offset = 0; offset < 40; ++offset)
    for (std::size_t num_bytes : {0, 1, 31, 32, 255, 256, 257, 511, 1'700}) {
      std::fill(target.begin(), target.end(), 0);
      dwdp::stream_copy(target.data() + offset, source.data() + offset / 3, num_bytes);
      CHECK(std::memcmp(target.data() + offset, source.data() + offset / 3, num_bytes) == 0);
      CHECK(target[offset + num_bytes] == 0);
    }
}

}  // namespace

int main() {
  any_alignment();
  for (unsigned num_threads : {1u, 2u, 4u})
    for (unsigned max_delay_us : {0u, 60u}) ring(num_threads, max_delay_us, num_threads);
  waiters();
  destroyed_while_busy();
  std::puts("ok");
}

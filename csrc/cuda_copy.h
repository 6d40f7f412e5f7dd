// The copy queue of the CUDA device: one stream of its own, ready and consumed events per batch.
//
// The same calls as the host's queue, with one difference: nothing sleeps. `wait` makes the compute
// stream wait for the batch, `consume` makes the copy stream wait for the compute stream.
//
//   compute stream   ... | wait(ready[l]) kernels of l record(consumed[l]) | ...
//   copy stream                wait(consumed[l]) copies of l+2 record(ready[l+2])
#pragma once

#include <cstddef>
#include <deque>
#include <vector>

#include "cuda_driver.h"
#include "host_copy.h"

namespace dwdp::cuda {

struct Batch {
  std::vector<Slice> slices;
  Event ready = nullptr;
  Event consumed = nullptr;
};

class CopyQueue {
 public:
  explicit CopyQueue(int ordinal);
  ~CopyQueue();
  CopyQueue(const CopyQueue&) = delete;
  CopyQueue& operator=(const CopyQueue&) = delete;

  Batch* add_batch(const Slice* slices, std::size_t num_slices);
  void issue(Batch* batch);                  // after everything the copy stream was told to wait for
  void wait(Batch* batch, Stream compute);   // compute waits for the batch's last fill
  void consume(Batch* batch, Stream compute);  // the slot of the batch is free after compute's work
  void drain();

 private:
  class Current;  // makes the device's primary context current for a scope
  void destroy() noexcept;

  const Driver& driver_;
  Device device_ = 0;
  Context context_ = nullptr;
  Stream stream_ = nullptr;
  std::deque<Batch> batches_;
};

}  // namespace dwdp::cuda

// The CUDA driver, loaded at run time: no toolkit to build, no driver to import the package.
//
// Own declarations of the few entry points that are used (names and argument orders as in the driver
// API reference); every status is checked and becomes a `CudaError` that names call, arguments and
// result. Unverified on hardware: see docs/gpu.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace dwdp::cuda {

using Result = int;  // CUresult
using Device = int;
using Context = void*;
using Stream = void*;
using Event = void*;
using Pointer = std::uint64_t;  // CUdeviceptr

class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Entry points of libcuda.so.1, resolved once. `get` throws `CudaError` if there is no driver.
class Driver {
 public:
  static const Driver& get();

  Result (*init)(unsigned flags);
  Result (*error_name)(Result, const char** name);
  Result (*device_get)(Device*, int ordinal);
  Result (*primary_retain)(Context*, Device);
  Result (*primary_release)(Device);
  Result (*context_push)(Context);
  Result (*context_pop)(Context*);
  Result (*stream_create)(Stream*, unsigned flags, int priority);
  Result (*stream_destroy)(Stream);
  Result (*stream_synchronize)(Stream);
  Result (*stream_wait_event)(Stream, Event, unsigned flags);
  Result (*event_create)(Event*, unsigned flags);
  Result (*event_destroy)(Event);
  Result (*event_record)(Event, Stream);
  Result (*event_query)(Event);
  Result (*copy_async)(Pointer destination, Pointer source, std::size_t num_bytes, Stream);

  // Throws unless `result` is success; `call` says what was called, with its arguments.
  void check(Result result, const std::string& call) const;

 private:
  Driver();
};

}  // namespace dwdp::cuda

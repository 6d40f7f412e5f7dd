// The CUDA driver, loaded at run time: no toolkit to build, no driver to import the package.
//
// Own declarations of the entry points that are used (names and argument orders as in the driver
// API reference; csrc/tests/cuda_declarations.cpp compares them with cuda.h where there is one).
// Every call goes through an `Entry`, which checks the status and throws a `CudaError` that names call,
// arguments and result. Unverified on hardware: see docs/gpu.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace dwdp::cuda {

using Result = int;    // CUresult
using DeviceId = int;  // CUdevice
using Context = struct ContextHandle*;
using Stream = struct StreamHandle*;
using Event = struct EventHandle*;
enum class Address : std::uint64_t {};     // CUdeviceptr
enum class Allocation : std::uint64_t {};  // CUmemGenericAllocationHandle

constexpr Result kSuccess = 0;
constexpr Result kNotReady = 600;

constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventDisableTiming = 2;
constexpr int kCaptureNone = 0;
constexpr int kCaptureActive = 1;
constexpr int kCaptureModeRelaxed = 2;
constexpr int kGranularityMinimum = 0;
constexpr int kGranularityRecommended = 1;
constexpr int kLocationDevice = 1;
constexpr int kAllocationPinned = 1;
constexpr int kHandleNone = 0;
constexpr int kHandlePosixFd = 1;
constexpr int kHandleFabric = 8;
constexpr int kAccessRead = 1;
constexpr int kAccessReadWrite = 3;
constexpr int kSourceInStreamOrder = 1;
constexpr unsigned kPreferOverlapWithCompute = 1;
constexpr int kPointerMemoryType = 2;
constexpr int kPointerDeviceOrdinal = 9;
constexpr int kMemoryTypeDevice = 2;
constexpr std::size_t kFabricHandleBytes = 64;

struct Location {
  int type;
  int id;
};

struct AllocationProperties {
  int type;
  int handle_types;
  Location location;
  void* win32_attributes;
  unsigned char compression;
  unsigned char gpu_direct_rdma;
  unsigned short usage;
  unsigned char reserved[4];
};

struct AccessDescription {
  Location location;
  int flags;
};

struct CopyAttributes {
  int source_order;
  Location source_hint;
  Location destination_hint;
  unsigned flags;
};

class CudaError : public std::runtime_error {
 public:
  explicit CudaError(const std::string& message, Result result = -1)
      : std::runtime_error(message), result_(result) {}
  Result result() const { return result_; }  // the driver's status; -1 if it was not asked

 private:
  Result result_;
};

// What an argument looks like in an error message. Handles and addresses are hexadecimal.
std::string hexadecimal(std::uintptr_t value);
std::string text(const AllocationProperties* properties);
std::string text(const AccessDescription* description);
inline std::string text(Address value) { return hexadecimal(static_cast<std::uintptr_t>(value)); }
inline std::string text(Allocation value) {
  return hexadecimal(static_cast<std::uintptr_t>(value));
}
inline std::string text(Context value) {
  return hexadecimal(reinterpret_cast<std::uintptr_t>(value));
}
inline std::string text(Stream value) {
  return hexadecimal(reinterpret_cast<std::uintptr_t>(value));
}
inline std::string text(Event value) {
  return hexadecimal(reinterpret_cast<std::uintptr_t>(value));
}
inline std::string text(const char* value) { return value; }
template <typename Number, std::enable_if_t<std::is_arithmetic_v<Number>, int> = 0>
std::string text(Number value) {
  return std::to_string(value);
}
template <typename Value>
std::string text(Value*) {
  return "_";  // an array, or a place for the result
}
template <typename Value>
std::string text(Value (*)(void*)) {
  return "function";
}

// "call returned 1 (CUDA_ERROR_INVALID_VALUE)".
std::string describe(const std::string& call, Result result);

// libcuda.so.1, opened; throws `CudaError` if there is none.
class Library {
 public:
  Library();
  void* find(const char* name) const;  // throws if the driver lacks it

 private:
  void* handle_;
};

// One function of the driver.
template <typename... Parameters>
class Entry {
 public:
  using Function = Result (*)(Parameters...);

  Entry(const Library& library, const char* name) : Entry(library.find(name), name) {}
  Entry(void* function, const char* name)
      : function_(reinterpret_cast<Function>(function)), name_(name) {}

  explicit operator bool() const { return function_ != nullptr; }

  // Throws `CudaError` unless the call succeeds.
  void operator()(Parameters... arguments) const {
    const Result result = function_(arguments...);
    if (result != kSuccess) throw CudaError(describe(call(arguments...), result), result);
  }

  // The status, for callers to whom a failure is an answer.
  Result attempt(Parameters... arguments) const { return function_(arguments...); }

  // For teardown, which goes on: a failure is added to `failures`.
  void note(std::string& failures, Parameters... arguments) const {
    const Result result = function_(arguments...);
    if (result == kSuccess) return;
    if (!failures.empty()) failures += "; ";
    failures += describe(call(arguments...), result);
  }

 private:
  std::string call(Parameters... arguments) const {
    std::string list;
    ((list += (list.empty() ? "" : ", ") + text(arguments)), ...);
    return name_ + ("(" + list + ")");
  }

  Function function_;
  const char* name_;
};

// The entry points, resolved once per process.
class Driver {
 public:
  static const Driver& get();

 private:
  Library library_;
  Entry<const char*, void**, int, std::uint64_t> get_proc_address{library_, "cuGetProcAddress"};
  Driver();
  void* find_versioned(const char* name, int cuda_version) const;  // null if the driver is older

 public:
  Entry<unsigned> init{library_, "cuInit"};
  Entry<int*> version{library_, "cuDriverGetVersion"};
  Entry<DeviceId*, int> device_get{library_, "cuDeviceGet"};
  Entry<char*, int, DeviceId> device_name{library_, "cuDeviceGetName"};
  Entry<Context*, DeviceId> primary_retain{library_, "cuDevicePrimaryCtxRetain"};
  Entry<DeviceId> primary_release{library_, "cuDevicePrimaryCtxRelease_v2"};
  Entry<Context> context_push{library_, "cuCtxPushCurrent_v2"};
  Entry<Context*> context_pop{library_, "cuCtxPopCurrent_v2"};
  Entry<> context_synchronize{library_, "cuCtxSynchronize"};
  Entry<int*, int*> priority_range{library_, "cuCtxGetStreamPriorityRange"};

  Entry<std::size_t*, std::size_t*> memory_info{library_, "cuMemGetInfo_v2"};
  Entry<std::size_t*, const AllocationProperties*, int> granularity{
      library_, "cuMemGetAllocationGranularity"};
  Entry<Allocation*, std::size_t, const AllocationProperties*, unsigned long long> create{
      library_, "cuMemCreate"};
  Entry<Allocation> release{library_, "cuMemRelease"};
  Entry<void*, Allocation, int, unsigned long long> export_handle{library_,
                                                                  "cuMemExportToShareableHandle"};
  Entry<Allocation*, void*, int> import_handle{library_, "cuMemImportFromShareableHandle"};
  Entry<Address*, std::size_t, std::size_t, Address, unsigned long long> reserve{
      library_, "cuMemAddressReserve"};
  Entry<Address, std::size_t> address_free{library_, "cuMemAddressFree"};
  Entry<Address, std::size_t, std::size_t, Allocation, unsigned long long> map{library_,
                                                                               "cuMemMap"};
  Entry<Address, std::size_t> unmap{library_, "cuMemUnmap"};
  Entry<Address, std::size_t, const AccessDescription*, std::size_t> set_access{library_,
                                                                                "cuMemSetAccess"};

  Entry<void*, int, Address> pointer_attribute{library_, "cuPointerGetAttribute"};
  Entry<Address, Address, std::size_t> copy_between{library_, "cuMemcpyDtoD_v2"};
  Entry<void*, Address, std::size_t> copy_to_host{library_, "cuMemcpyDtoH_v2"};
  Entry<Address, const void*, std::size_t> copy_to_device{library_, "cuMemcpyHtoD_v2"};
  Entry<Address, Address, std::size_t, Stream> copy_async{library_, "cuMemcpyAsync"};
  Entry<Address, unsigned char, std::size_t, Stream> set_async{library_, "cuMemsetD8Async"};
  // Null before CUDA 12.8; not capturable.
  Entry<Address*, Address*, std::size_t*, std::size_t, CopyAttributes*, std::size_t*, std::size_t,
        std::size_t*, Stream>
      copy_batch_async{find_versioned("cuMemcpyBatchAsync", 12080), "cuMemcpyBatchAsync"};

  Entry<Stream*, unsigned, int> stream_create{library_, "cuStreamCreateWithPriority"};
  Entry<Stream> stream_destroy{library_, "cuStreamDestroy_v2"};
  Entry<Stream> stream_synchronize{library_, "cuStreamSynchronize"};
  Entry<Stream, Event, unsigned> stream_wait_event{library_, "cuStreamWaitEvent"};
  Entry<Stream, void (*)(void*), void*> launch_host_function{library_, "cuLaunchHostFunc"};
  // Status, id; graph and dependencies are not asked for.
  Entry<Stream, int*, std::uint64_t*, void**, void*, std::size_t*> capture_info{
      library_, "cuStreamGetCaptureInfo_v2"};
  Entry<int*> exchange_capture_mode{library_, "cuThreadExchangeStreamCaptureMode"};
  Entry<Event*, unsigned> event_create{library_, "cuEventCreate"};
  Entry<Event> event_destroy{library_, "cuEventDestroy_v2"};
  Entry<Event, Stream> event_record{library_, "cuEventRecord"};
  Entry<Event> event_query{library_, "cuEventQuery"};
};

}  // namespace dwdp::cuda

// The CUDA part of the C ABI, declared for ctypes in `vllm_dwdp/device/cuda_library.py`. Addresses are
// device addresses. Functions return 0, the driver's status, or -1; `dwdp_last_error` says more.
#include <cstdint>
#include <cstring>

#include "abi.h"
#include "cuda_device.h"
#include "cuda_queue.h"

namespace {

using dwdp::cuda::Address;
using dwdp::cuda::Allocation;
using dwdp::cuda::Batch;
using dwdp::cuda::CopyQueue;
using dwdp::cuda::Device;
using dwdp::cuda::Stream;

template <typename Action>
int checked(Action action) {
  try {
    action();
    return 0;
  } catch (const dwdp::cuda::CudaError& error) {
    dwdp::abi::last_error() = error.what();
    return error.result();
  } catch (const std::exception& error) {
    dwdp::abi::last_error() = error.what();
    return -1;
  }
}

const Device& device_of(void* device) { return *static_cast<Device*>(device); }
CopyQueue& queue_of(void* queue) { return *static_cast<CopyQueue*>(queue); }
Batch* batch_of(void* batch) { return static_cast<Batch*>(batch); }

}  // namespace

// --- one device: context, memory, blocking copies ------------------------------------------------

DWDP_API int dwdp_cuda_device_open(int ordinal, void** device) {
  return checked([&] { *device = new Device(ordinal); });
}

// The device is gone also when a step failed.
DWDP_API int dwdp_cuda_device_close(void* device) {
  return checked([&] {
    auto* typed = static_cast<Device*>(device);
    const std::string failures = typed->close();
    delete typed;
    if (!failures.empty()) throw dwdp::cuda::CudaError(failures);
  });
}

DWDP_API int dwdp_cuda_device_name(void* device, char* name, std::size_t num_bytes) {
  return checked([&] {
    std::strncpy(name, device_of(device).name().c_str(), num_bytes - 1);
    name[num_bytes - 1] = 0;
  });
}

DWDP_API int dwdp_cuda_granularity(void* device, int handle_types, std::size_t* num_bytes) {
  return checked([&] { *num_bytes = device_of(device).granularity(handle_types); });
}

DWDP_API int dwdp_cuda_memory_info(void* device, std::size_t* free_bytes,
                                   std::size_t* total_bytes) {
  return checked([&] { device_of(device).memory_info(free_bytes, total_bytes); });
}

DWDP_API int dwdp_cuda_makes_handles(void* device, int handle_types, int* made) {
  return checked([&] { *made = device_of(device).makes_handles(handle_types) ? 1 : 0; });
}

DWDP_API int dwdp_cuda_create(void* device, std::size_t num_bytes, int handle_type,
                              Allocation* allocation) {
  return checked([&] { *allocation = device_of(device).create(num_bytes, handle_type); });
}

DWDP_API int dwdp_cuda_release(void* device, Allocation allocation) {
  return checked([&] { device_of(device).release(allocation); });
}

DWDP_API int dwdp_cuda_export_fd(void* device, Allocation allocation, int* fd) {
  return checked([&] { *fd = device_of(device).export_fd(allocation); });
}

DWDP_API int dwdp_cuda_import_fd(void* device, int fd, Allocation* allocation) {
  return checked([&] { *allocation = device_of(device).import_fd(fd); });
}

// `handle` has 64 bytes.
DWDP_API int dwdp_cuda_export_fabric(void* device, Allocation allocation, unsigned char* handle) {
  return checked([&] {
    const auto exported = device_of(device).export_fabric(allocation);
    std::memcpy(handle, exported.data(), exported.size());
  });
}

DWDP_API int dwdp_cuda_import_fabric(void* device, const unsigned char* handle,
                                     Allocation* allocation) {
  return checked([&] {
    dwdp::cuda::FabricHandle imported;
    std::memcpy(imported.data(), handle, imported.size());
    *allocation = device_of(device).import_fabric(imported);
  });
}

DWDP_API int dwdp_cuda_reserve(void* device, std::size_t num_bytes, Address* address) {
  return checked([&] { *address = device_of(device).reserve(num_bytes); });
}

DWDP_API int dwdp_cuda_free_address(void* device, Address address, std::size_t num_bytes) {
  return checked([&] { device_of(device).free_address(address, num_bytes); });
}

DWDP_API int dwdp_cuda_map(void* device, Address address, std::size_t num_bytes,
                           Allocation allocation) {
  return checked([&] { device_of(device).map(address, num_bytes, allocation); });
}

DWDP_API int dwdp_cuda_unmap(void* device, Address address, std::size_t num_bytes) {
  return checked([&] { device_of(device).unmap(address, num_bytes); });
}

DWDP_API int dwdp_cuda_set_access(void* device, Address address, std::size_t num_bytes,
                                  int writable) {
  return checked([&] { device_of(device).set_access(address, num_bytes, writable != 0); });
}

DWDP_API int dwdp_cuda_copy(void* device, Address destination, Address source,
                            std::size_t num_bytes) {
  return checked([&] { device_of(device).copy(destination, source, num_bytes); });
}

DWDP_API int dwdp_cuda_read(void* device, void* destination, Address source,
                            std::size_t num_bytes) {
  return checked([&] { device_of(device).read(destination, source, num_bytes); });
}

DWDP_API int dwdp_cuda_write(void* device, Address destination, const void* source,
                             std::size_t num_bytes) {
  return checked([&] { device_of(device).write(destination, source, num_bytes); });
}

DWDP_API int dwdp_cuda_synchronize(void* device) {
  return checked([&] { device_of(device).synchronize(); });
}

// --- the copy queue ------------------------------------------------------------------------------

DWDP_API int dwdp_cuda_queue_open(int ordinal, int poison, unsigned max_delay_us,
                                  std::uint64_t seed, void** queue) {
  return checked([&] { *queue = new CopyQueue(ordinal, {poison != 0, max_delay_us, seed}); });
}

// Finishes what was issued. The queue is gone also when a step failed.
DWDP_API int dwdp_cuda_queue_close(void* queue) {
  return checked([&] {
    const std::string failures = queue_of(queue).close();
    delete static_cast<CopyQueue*>(queue);
    if (!failures.empty()) throw dwdp::cuda::CudaError(failures);
  });
}

DWDP_API int dwdp_cuda_queue_uses_batch_copy(void* queue) {
  return queue_of(queue).uses_batch_copy() ? 1 : 0;
}

DWDP_API int dwdp_cuda_queue_driver_version(void* queue, int* version) {
  return checked([&] { *version = queue_of(queue).driver_version(); });
}

DWDP_API std::size_t dwdp_cuda_queue_num_copies(void* queue) {
  return queue_of(queue).num_copies();
}

DWDP_API std::size_t dwdp_cuda_queue_num_overlapping(void* queue) {
  return queue_of(queue).num_overlapping();
}

DWDP_API int dwdp_cuda_queue_add_batch(void* queue, const dwdp::Slice* slices,
                                       const std::size_t* wave_sizes, std::size_t num_waves,
                                       void** batch) {
  return checked([&] { *batch = queue_of(queue).add_batch(slices, wave_sizes, num_waves); });
}

DWDP_API int dwdp_cuda_queue_issue(void* queue, void* batch, void* after) {
  return checked([&] { queue_of(queue).issue(batch_of(batch), batch_of(after)); });
}

DWDP_API int dwdp_cuda_queue_wait(void* queue, void* batch, Stream stream) {
  return checked([&] { queue_of(queue).wait(batch_of(batch), stream); });
}

DWDP_API int dwdp_cuda_queue_record(void* queue, void* batch, Stream stream) {
  return checked([&] { queue_of(queue).record(batch_of(batch), stream); });
}

DWDP_API int dwdp_cuda_queue_capture_record(void* queue, void* batch, Stream stream) {
  return checked([&] { queue_of(queue).capture_record(batch_of(batch), stream); });
}

DWDP_API int dwdp_cuda_queue_capture_fill(void* queue, void* batch, void* after, Stream stream) {
  return checked(
      [&] { queue_of(queue).capture_fill(batch_of(batch), batch_of(after), stream); });
}

DWDP_API int dwdp_cuda_queue_is_capturing(void* queue, Stream stream, int* capturing) {
  return checked([&] { *capturing = queue_of(queue).is_capturing(stream) ? 1 : 0; });
}

DWDP_API int dwdp_cuda_queue_is_done(void* queue, void* batch, int* done) {
  return checked([&] { *done = queue_of(queue).is_done(batch_of(batch)) ? 1 : 0; });
}

DWDP_API int dwdp_cuda_queue_drain(void* queue) {
  return checked([&] { queue_of(queue).drain(); });
}

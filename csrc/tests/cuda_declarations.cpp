// Compares our declarations of the CUDA driver with NVIDIA's, where cuda.h is: compile only.
#define __CUDA_API_VERSION_INTERNAL  // every function under the name that the library exports
#include <cuda.h>

#include <cstddef>

#include "../cuda_driver.h"

namespace {

using namespace dwdp::cuda;

// Arguments are passed alike: pointers as pointers, numbers of one size.
template <typename Ours, typename Theirs>
constexpr bool kPassedAlike =
    sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs>;

template <typename Ours, typename Theirs>
struct CalledAlike : std::false_type {};
template <typename... Ours, typename... Theirs>
struct CalledAlike<Entry<Ours...>, CUresult (*)(Theirs...)> {
  static constexpr bool compare() {
    if constexpr (sizeof...(Ours) == sizeof...(Theirs))
      return (kPassedAlike<Ours, Theirs> && ...);
    else
      return false;
  }
  static constexpr bool value = compare();
};

#define SAME_CALL(entry, function) \
  static_assert(CalledAlike<decltype(Driver::entry), decltype(&function)>::value, #function)

SAME_CALL(init, cuInit);
SAME_CALL(version, cuDriverGetVersion);
SAME_CALL(device_get, cuDeviceGet);
SAME_CALL(device_name, cuDeviceGetName);
SAME_CALL(primary_retain, cuDevicePrimaryCtxRetain);
SAME_CALL(primary_release, cuDevicePrimaryCtxRelease_v2);
SAME_CALL(context_push, cuCtxPushCurrent_v2);
SAME_CALL(context_pop, cuCtxPopCurrent_v2);
SAME_CALL(context_synchronize, cuCtxSynchronize);
SAME_CALL(priority_range, cuCtxGetStreamPriorityRange);
SAME_CALL(memory_info, cuMemGetInfo_v2);
SAME_CALL(granularity, cuMemGetAllocationGranularity);
SAME_CALL(create, cuMemCreate);
SAME_CALL(release, cuMemRelease);
SAME_CALL(export_handle, cuMemExportToShareableHandle);
SAME_CALL(import_handle, cuMemImportFromShareableHandle);
SAME_CALL(reserve, cuMemAddressReserve);
SAME_CALL(address_free, cuMemAddressFree);
SAME_CALL(map, cuMemMap);
SAME_CALL(unmap, cuMemUnmap);
SAME_CALL(set_access, cuMemSetAccess);
SAME_CALL(pointer_attribute, cuPointerGetAttribute);
SAME_CALL(copy_between, cuMemcpyDtoD_v2);
SAME_CALL(copy_to_host, cuMemcpyDtoH_v2);
SAME_CALL(copy_to_device, cuMemcpyHtoD_v2);
SAME_CALL(copy_async, cuMemcpyAsync);
SAME_CALL(set_async, cuMemsetD8Async);
SAME_CALL(copy_batch_async, cuMemcpyBatchAsync);  // the one of CUDA 12.8, with `failIdx`
SAME_CALL(stream_create, cuStreamCreateWithPriority);
SAME_CALL(stream_destroy, cuStreamDestroy_v2);
SAME_CALL(stream_synchronize, cuStreamSynchronize);
SAME_CALL(stream_wait_event, cuStreamWaitEvent);
SAME_CALL(launch_host_function, cuLaunchHostFunc);
SAME_CALL(capture_info, cuStreamGetCaptureInfo_v2);
SAME_CALL(exchange_capture_mode, cuThreadExchangeStreamCaptureMode);
SAME_CALL(event_create, cuEventCreate);
SAME_CALL(event_destroy, cuEventDestroy_v2);
SAME_CALL(event_record, cuEventRecord);
SAME_CALL(event_query, cuEventQuery);

static_assert(sizeof(Location) == sizeof(CUmemLocation));
static_assert(offsetof(Location, id) == offsetof(CUmemLocation, id));
static_assert(sizeof(AllocationProperties) == sizeof(CUmemAllocationProp));
static_assert(offsetof(AllocationProperties, handle_types) ==
              offsetof(CUmemAllocationProp, requestedHandleTypes));
static_assert(offsetof(AllocationProperties, location) == offsetof(CUmemAllocationProp, location));
static_assert(offsetof(AllocationProperties, win32_attributes) ==
              offsetof(CUmemAllocationProp, win32HandleMetaData));
static_assert(offsetof(AllocationProperties, usage) ==
              offsetof(CUmemAllocationProp, allocFlags.usage));
static_assert(sizeof(AccessDescription) == sizeof(CUmemAccessDesc));
static_assert(offsetof(AccessDescription, flags) == offsetof(CUmemAccessDesc, flags));
static_assert(sizeof(CopyAttributes) == sizeof(CUmemcpyAttributes));
static_assert(offsetof(CopyAttributes, source_hint) == offsetof(CUmemcpyAttributes, srcLocHint));
static_assert(offsetof(CopyAttributes, destination_hint) ==
              offsetof(CUmemcpyAttributes, dstLocHint));
static_assert(offsetof(CopyAttributes, flags) == offsetof(CUmemcpyAttributes, flags));
static_assert(kFabricHandleBytes == sizeof(CUmemFabricHandle));

static_assert(kSuccess == CUDA_SUCCESS && kNotReady == CUDA_ERROR_NOT_READY);
static_assert(kStreamNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(kEventDisableTiming == CU_EVENT_DISABLE_TIMING);
static_assert(kCaptureNone == CU_STREAM_CAPTURE_STATUS_NONE);
static_assert(kCaptureActive == CU_STREAM_CAPTURE_STATUS_ACTIVE);
static_assert(kCaptureModeRelaxed == CU_STREAM_CAPTURE_MODE_RELAXED);
static_assert(kGranularityMinimum == CU_MEM_ALLOC_GRANULARITY_MINIMUM);
static_assert(kGranularityRecommended == CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
static_assert(kLocationDevice == CU_MEM_LOCATION_TYPE_DEVICE);
static_assert(kAllocationPinned == CU_MEM_ALLOCATION_TYPE_PINNED);
static_assert(kHandleNone == CU_MEM_HANDLE_TYPE_NONE);
static_assert(kHandlePosixFd == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
static_assert(kHandleFabric == CU_MEM_HANDLE_TYPE_FABRIC);
static_assert(kAccessRead == CU_MEM_ACCESS_FLAGS_PROT_READ);
static_assert(kAccessReadWrite == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
static_assert(kSourceInStreamOrder == CU_MEMCPY_SRC_ACCESS_ORDER_STREAM);
static_assert(kPointerMemoryType == CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
static_assert(kPointerDeviceOrdinal == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
static_assert(kMemoryTypeDevice == CU_MEMORYTYPE_DEVICE);
static_assert(kPreferOverlapWithCompute == CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE);

}  // namespace

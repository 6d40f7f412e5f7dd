#include "cuda_driver.h"

#include <dlfcn.h>

namespace dwdp::cuda {
namespace {

template <typename Function>
void resolve(void* library, Function& function, const char* name) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr)
    throw CudaError(std::string("libcuda.so.1 has no ") + name + ": the NVIDIA driver is too old");
}

}  // namespace

const Driver& Driver::get() {
  static const Driver driver;  // a throwing constructor is tried again by the next call
  return driver;
}

Driver::Driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw CudaError(std::string("no NVIDIA driver: ") + (reason != nullptr ? reason : "dlopen failed"));
  }
  resolve(library, init, "cuInit");
  resolve(library, error_name, "cuGetErrorName");
  resolve(library, device_get, "cuDeviceGet");
  resolve(library, primary_retain, "cuDevicePrimaryCtxRetain");
  resolve(library, primary_release, "cuDevicePrimaryCtxRelease_v2");
  resolve(library, context_push, "cuCtxPushCurrent_v2");
  resolve(library, context_pop, "cuCtxPopCurrent_v2");
  resolve(library, stream_create, "cuStreamCreateWithPriority");
  resolve(library, stream_destroy, "cuStreamDestroy_v2");
  resolve(library, stream_synchronize, "cuStreamSynchronize");
  resolve(library, stream_wait_event, "cuStreamWaitEvent");
  resolve(library, event_create, "cuEventCreate");
  resolve(library, event_destroy, "cuEventDestroy_v2");
  resolve(library, event_record, "cuEventRecord");
  resolve(library, event_query, "cuEventQuery");
  resolve(library, copy_async, "cuMemcpyAsync");
  check(init(0), "cuInit(0)");
}

void Driver::check(Result result, const std::string& call) const {
  if (result == 0) return;
  const char* name = nullptr;
  if (error_name(result, &name) != 0 || name == nullptr) name = "unknown error";
  throw CudaError(call + " returned " + std::to_string(result) + " (" + name + ")");
}

}  // namespace dwdp::cuda

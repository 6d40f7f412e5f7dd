#include "cuda_driver.h"

#include <dlfcn.h>

#include <cstdio>

namespace dwdp::cuda {
namespace {

using ErrorName = Result (*)(Result, const char**);
ErrorName error_name = nullptr;  // set before the first call that can fail

}  // namespace

std::string hexadecimal(std::uintptr_t value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "0x%llx", static_cast<unsigned long long>(value));
  return value == 0 ? "0" : buffer;
}

std::string text(const AllocationProperties* properties) {
  return "{device " + std::to_string(properties->location.id) + ", handle type " +
         std::to_string(properties->handle_types) + "}";
}

std::string text(const AccessDescription* description) {
  return "{device " + std::to_string(description->location.id) + ", access " +
         std::to_string(description->flags) + "}";
}

std::string describe(const std::string& call, Result result) {
  const char* name = nullptr;
  if (error_name == nullptr || error_name(result, &name) != kSuccess || name == nullptr)
    name = "unknown error";
  return call + " returned " + std::to_string(result) + " (" + name + ")";
}

Library::Library() : handle_(dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) {
  if (handle_ == nullptr) {
    const char* reason = dlerror();
    throw CudaError(std::string("no NVIDIA driver: ") +
                    (reason != nullptr ? reason : "dlopen failed"));
  }
  error_name = reinterpret_cast<ErrorName>(find("cuGetErrorName"));
}

void* Library::find(const char* name) const {
  void* function = dlsym(handle_, name);
  if (function == nullptr)
    throw CudaError(std::string("libcuda.so.1 has no ") + name + ": the NVIDIA driver is too old");
  return function;
}

const Driver& Driver::get() {
  static const Driver driver;  // a throwing constructor is tried again by the next call
  return driver;
}

Driver::Driver() { init(0); }

void* Driver::find_versioned(const char* name, int cuda_version) const {
  void* function = nullptr;
  constexpr std::uint64_t default_search = 0;
  const Result result = get_proc_address.attempt(name, &function, cuda_version, default_search);
  return result == kSuccess ? function : nullptr;
}

}  // namespace dwdp::cuda

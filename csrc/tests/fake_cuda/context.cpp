// The fake driver's settings, errors, devices and contexts. NOT A GPU.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fake.h"

namespace fake {
namespace {

struct Setting {
  const char* name;
  const char* environment;
  const char* fallback;
  void (*apply)(Settings&, const char*);
};

long number(const char* value) { return std::strtol(value, nullptr, 10); }

const Setting kSettings[] = {
    {"devices", "DWDP_FAKE_CUDA_DEVICES", "2",
     [](Settings& all, const char* value) { all.num_devices = static_cast<int>(number(value)); }},
    {"memory_mib", "DWDP_FAKE_CUDA_MEMORY_MIB", "4096",
     [](Settings& all, const char* value) {
       all.memory_bytes = static_cast<std::size_t>(number(value)) << 20;
     }},
    {"version", "DWDP_FAKE_CUDA_VERSION", "13000",
     [](Settings& all, const char* value) { all.version = static_cast<int>(number(value)); }},
    {"fabric", "DWDP_FAKE_CUDA_FABRIC", "0",
     [](Settings& all, const char* value) { all.fabric = number(value) != 0; }},
    {"posix", "DWDP_FAKE_CUDA_POSIX", "2",
     [](Settings& all, const char* value) { all.posix = static_cast<int>(number(value)); }},
    {"combined", "DWDP_FAKE_CUDA_COMBINED", "1",
     [](Settings& all, const char* value) { all.combined = number(value) != 0; }},
    {"fabric_granularity_mib", "DWDP_FAKE_CUDA_FABRIC_GRANULARITY_MIB", "2",
     [](Settings& all, const char* value) {
       all.fabric_granularity = static_cast<std::size_t>(number(value)) << 20;
     }},
    {"mixed_access", "DWDP_FAKE_CUDA_MIXED_ACCESS", "2",
     [](Settings& all, const char* value) { all.mixed_access = static_cast<int>(number(value)); }},
    {"peer_mappings", "DWDP_FAKE_CUDA_PEER_MAPPINGS", "1000000",
     [](Settings& all, const char* value) {
       all.peer_mappings = static_cast<std::size_t>(number(value));
     }},
    {"read_only", "DWDP_FAKE_CUDA_READ_ONLY", "1",
     [](Settings& all, const char* value) { all.read_only = number(value) != 0; }},
    {"max_delay_us", "DWDP_FAKE_CUDA_MAX_DELAY_US", "0",
     [](Settings& all, const char* value) {
       all.max_delay_us = static_cast<unsigned>(number(value));
     }},
    {"queue_depth", "DWDP_FAKE_CUDA_QUEUE_DEPTH", "0",
     [](Settings& all, const char* value) {
       all.queue_depth = static_cast<std::size_t>(number(value));
     }},
    {"stall_ms", "DWDP_FAKE_CUDA_STALL_MS", "20000",
     [](Settings& all, const char* value) {
       all.stall_ms = static_cast<unsigned>(number(value));
     }},
    {"seed", "DWDP_FAKE_CUDA_SEED", "0",
     [](Settings& all, const char* value) {
       all.random = static_cast<std::uint64_t>(number(value));
     }},
};

void set(Settings& all, const Setting& setting, const char* value) {
  if (value == nullptr) value = std::getenv(setting.environment);
  setting.apply(all, value != nullptr ? value : setting.fallback);
}

Settings& all_settings() {
  static Settings* all = [] {
    auto* made = new Settings;  // never destroyed: threads of streams may outlive main
    for (const Setting& setting : kSettings) set(*made, setting, nullptr);
    return made;
  }();
  return *all;
}

bool initialized = false;
std::map<int, int> retained;  // references to each device's primary context
int contexts[64];             // a context is the address of its element
thread_local std::vector<void*> current;

bool valid_context(void* context) {
  const auto* element = static_cast<int*>(context);
  return element >= contexts && element < contexts + settings().num_devices &&
         retained[static_cast<int>(element - contexts)] > 0;
}

}  // namespace

const Settings& settings() { return all_settings(); }

void pause() {
  const unsigned max_delay_us = settings().max_delay_us;
  if (max_delay_us == 0) return;
  std::uint64_t value = all_settings().random.fetch_add(0x9e3779b97f4a7c15);
  value = (value ^ (value >> 32)) * 0xd6e8feb86659fd93;
  std::this_thread::sleep_for(std::chrono::microseconds((value >> 32) % max_delay_us));
}

std::mutex& state_mutex() {
  static auto* mutex = new std::mutex;  // never destroyed: threads of streams may outlive main
  return *mutex;
}

void require_context() {
  require(initialized, kNotInitialized);
  require(!current.empty() && valid_context(current.back()), kInvalidContext);
}

Live live() {
  Live live = {};
  count_memory(live);
  count_streams(live);
  live.graphs = num_graphs();
  return live;
}

Counts& counts() {
  static Counts counts = {};
  return counts;
}

}  // namespace fake

using namespace fake;

// Only this driver has these three.
FAKE_API void dwdp_fake_cuda_counts(Counts* result) {
  api([&](Lock&) { *result = counts(); });
}

FAKE_API void dwdp_fake_cuda_live(Live* result) {
  api([&](Lock&) { *result = live(); });
}

// `value` may be null: what the environment says, or the default.
FAKE_API Result dwdp_fake_cuda_set(const char* name, const char* value) {
  return api([&](Lock&) {
    for (const Setting& setting : kSettings)
      if (std::strcmp(setting.name, name) == 0) return set(all_settings(), setting, value);
    throw Failure{kInvalidValue};
  });
}

FAKE_API Result cuInit(unsigned flags) {
  return api([&](Lock&) {
    require(flags == 0, kInvalidValue);
    initialized = true;
  });
}

FAKE_API Result cuGetErrorName(Result result, const char** name) {
  static const std::map<Result, const char*> names = {
      {kSuccess, "CUDA_SUCCESS"},
      {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
      {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
      {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED"},
      {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},
      {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
      {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},
      {kIllegalState, "CUDA_ERROR_ILLEGAL_STATE"},
      {kNotReady, "CUDA_ERROR_NOT_READY"},
      {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS"},
      {kLaunchTimeout, "CUDA_ERROR_LAUNCH_TIMEOUT"},
      {kNotPermitted, "CUDA_ERROR_NOT_PERMITTED"},
      {kNotSupported, "CUDA_ERROR_NOT_SUPPORTED"},
      {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
      {kCaptureInvalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
      {kCaptureMerge, "CUDA_ERROR_STREAM_CAPTURE_MERGE"},
      {kCaptureUnmatched, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED"},
      {kCaptureUnjoined, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED"},
      {kCaptureIsolation, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"},
      {kCaptureImplicit, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"},
      {kCapturedEvent, "CUDA_ERROR_CAPTURED_EVENT"},
      {kCaptureWrongThread, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"}};
  const auto found = names.find(result);
  *name = found != names.end() ? found->second : nullptr;
  return found != names.end() ? kSuccess : kInvalidValue;
}

FAKE_API Result cuDriverGetVersion(int* version) {
  *version = settings().version;
  return kSuccess;
}

FAKE_API Result cuDeviceGet(int* device, int ordinal) {
  return api([&](Lock&) {
    require(initialized, kNotInitialized);
    require(ordinal >= 0 && ordinal < settings().num_devices, kInvalidDevice);
    *device = ordinal;
  });
}

FAKE_API Result cuDeviceGetName(char* name, int num_bytes, int) {
  std::snprintf(name, static_cast<std::size_t>(num_bytes), "FAKE CUDA (host memory, not a GPU)");
  return kSuccess;
}

FAKE_API Result cuDevicePrimaryCtxRetain(void** context, int device) {
  return api([&](Lock&) {
    require(initialized, kNotInitialized);
    require(device >= 0 && device < settings().num_devices, kInvalidDevice);
    ++retained[device];
    *context = &contexts[device];
  });
}

// The end of the last context with anything alive is an error here; the real driver cleans up.
FAKE_API Result cuDevicePrimaryCtxRelease_v2(int device) {
  return api([&](Lock&) {
    require(retained[device] > 0, kInvalidContext);
    --retained[device];
    for (const auto& [other, references] : retained)
      if (references > 0) return;
    fail_later(kSuccess);  // an asynchronous error ends with the last context
    const Live left = live();
    if (left.handles + left.mappings + left.reservations + left.streams + left.events +
            left.graphs ==
        0)
      return;
    std::fprintf(stderr,
                 "fake cuda: leaked %zu handles, %zu mappings, %zu reservations, %zu streams, "
                 "%zu events, %zu graphs\n",
                 left.handles, left.mappings, left.reservations, left.streams, left.events,
                 left.graphs);
    throw Failure{kIllegalState};
  });
}

FAKE_API Result cuCtxPushCurrent_v2(void* context) {
  return api([&](Lock&) {
    require(valid_context(context), kInvalidContext);
    current.push_back(context);
  });
}

FAKE_API Result cuCtxPopCurrent_v2(void** context) {
  return api([&](Lock&) {
    require(!current.empty(), kInvalidContext);
    *context = current.back();
    current.pop_back();
  });
}

FAKE_API Result cuCtxGetStreamPriorityRange(int* lowest, int* highest) {
  return api([&](Lock&) {
    require_context();
    *lowest = 0;
    *highest = -5;
  });
}

FAKE_API Result cuCtxSynchronize() {
  return api([&](Lock& lock) {
    require_context();
    forbid_during_capture();
    wait_for_everything(lock);
    require(late_failure() == kSuccess, late_failure());
  });
}

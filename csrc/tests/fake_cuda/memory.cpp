// The fake driver's virtual memory: allocations are memfds, mappings are mmap. NOT A GPU.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "fake.h"

namespace fake {
namespace {

constexpr std::size_t kGranularity = std::size_t{2} << 20;
constexpr int kPinned = 1, kOnDevice = 1;
constexpr int kHandleFd = 1, kHandleFabric = 8;
constexpr int kRead = 1, kReadWrite = 3;
constexpr std::size_t kFabricBytes = 64;
constexpr char kName[] = "fake-cuda-";

// The driver's structures, as it lays them out.
struct Location {
  int type, id;
};
struct Properties {
  int type, handle_types;
  Location location;
  void* win32_attributes;
  unsigned char flags[8];
};
struct AccessDescription {
  Location location;
  int flags;
};

struct Allocation {
  int fd;
  std::size_t num_bytes;
  int handle_types;
  bool imported;
  ~Allocation();
};

struct Mapping {
  std::size_t num_bytes;
  std::shared_ptr<Allocation> allocation;
  int access;
};

struct Memory {
  std::map<std::uint64_t, std::shared_ptr<Allocation>> handles;
  std::map<std::uintptr_t, std::size_t> reservations;
  std::map<std::uintptr_t, Mapping> mappings;
  std::uint64_t next_handle = 0x0fa4e001;
  std::size_t allocated = 0;
};
Memory& memory() {
  static auto* memory = new Memory;
  return *memory;
}

Allocation::~Allocation() {
  close(fd);
  if (!imported) memory().allocated -= num_bytes;
}

std::size_t granularity_of(int handle_types) {
  return handle_types & kHandleFabric ? settings().fabric_granularity.load() : kGranularity;
}

void require_multiple(std::uintptr_t value, std::size_t of = kGranularity) {
  require(value != 0 && value % of == 0, kInvalidValue);
}

void require_makeable(int handle_types) {
  require((handle_types & ~(kHandleFd | kHandleFabric)) == 0, kInvalidValue);
  require(!(handle_types & kHandleFd) || settings().posix > 0, kNotSupported);
  require(!(handle_types & kHandleFabric) || settings().fabric, kNotPermitted);
  require(handle_types != (kHandleFd | kHandleFabric) || settings().combined, kNotSupported);
}

void require_pinned_on_device(const Properties& properties) {
  require(properties.type == kPinned && properties.location.type == kOnDevice, kInvalidValue);
  require(properties.location.id >= 0 && properties.location.id < settings().num_devices,
          kInvalidDevice);
}

// Closed to pages: addresses that belong to no other object.
void forbid_access(std::uintptr_t address, std::size_t num_bytes) {
  mmap(reinterpret_cast<void*>(address), num_bytes, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

// The reservation that holds all of a range; null if none does.
const std::pair<const std::uintptr_t, std::size_t>* reservation_of(std::uintptr_t address,
                                                                   std::size_t num_bytes) {
  const auto after = memory().reservations.upper_bound(address);
  if (after == memory().reservations.begin()) return nullptr;
  const auto& found = *std::prev(after);
  return address + num_bytes <= found.first + found.second ? &found : nullptr;
}

bool anything_mapped(std::uintptr_t address, std::size_t num_bytes) {
  auto next = memory().mappings.lower_bound(address);
  if (next != memory().mappings.end() && next->first < address + num_bytes) return true;
  return next != memory().mappings.begin() &&
         std::prev(next)->first + std::prev(next)->second.num_bytes > address;
}

std::shared_ptr<Allocation>& allocation_of(std::uint64_t handle) {
  const auto found = memory().handles.find(handle);
  require(found != memory().handles.end(), kInvalidValue);
  return found->second;
}

std::uint64_t add_handle(int fd, std::size_t num_bytes, int handle_types, bool imported) {
  Memory& all = memory();
  if (!imported) all.allocated += num_bytes;
  all.handles[all.next_handle] =
      std::shared_ptr<Allocation>(new Allocation{fd, num_bytes, handle_types, imported});
  return all.next_handle++;
}

// Its name says on which device an allocation lies, also to who imports it.
int device_of(const Allocation& allocation) {
  char link[64] = {}, name[128] = {};
  std::snprintf(link, sizeof link, "/proc/self/fd/%d", allocation.fd);
  if (readlink(link, name, sizeof name - 1) < 0) return -1;
  const char* number = std::strstr(name, kName);
  return number != nullptr ? std::atoi(number + std::strlen(kName)) : -1;
}

std::uint64_t import(int fd, int handle_types) {
  struct stat status;
  require(fd >= 0 && fstat(fd, &status) == 0 && S_ISREG(status.st_mode), kInvalidValue);
  const auto num_bytes = static_cast<std::size_t>(status.st_size);
  require(num_bytes != 0 && num_bytes % kGranularity == 0, kInvalidValue);
  return add_handle(fcntl(fd, F_DUPFD_CLOEXEC, 0), num_bytes, handle_types, true);
}

std::size_t num_peer_mappings() {
  std::size_t count = 0;
  for (const auto& [address, mapping] : memory().mappings) count += mapping.allocation->imported;
  return count;
}

// What a driver may refuse where a reservation holds memory of several devices; own and imported memory
// stand for them.
void require_access_to_mixed(std::uintptr_t address, std::size_t num_bytes) {
  const int allowed = settings().mixed_access;
  if (allowed == 2) return;
  const auto* reservation = reservation_of(address, num_bytes);
  require(reservation != nullptr, kInvalidValue);
  bool touches_imported = false, has_own = false;
  int touched = 0;
  for (const auto& [start, mapping] : memory().mappings) {
    if (start < reservation->first || start >= reservation->first + reservation->second) continue;
    const bool inside = start >= address && start < address + num_bytes;
    touched += inside;
    touches_imported |= inside && mapping.allocation->imported;
    has_own |= !mapping.allocation->imported;
  }
  if (!touches_imported || !has_own) return;
  require(allowed == 1 && touched == 1, kInvalidValue);
}

}  // namespace

void count_memory(Live& live) {
  live.handles = memory().handles.size();
  live.mappings = memory().mappings.size();
  live.reservations = memory().reservations.size();
}

// Memory outside all reservations is the host's, and left to the host's own protection.
bool accessible(const void* pointer, std::size_t num_bytes, bool write) {
  auto address = reinterpret_cast<std::uintptr_t>(pointer);
  const std::uintptr_t end = address + num_bytes;
  if (reservation_of(address, 1) == nullptr) return true;
  while (address < end) {
    const auto after = memory().mappings.upper_bound(address);
    if (after == memory().mappings.begin()) return false;
    const auto& [start, mapping] = *std::prev(after);
    if (address >= start + mapping.num_bytes) return false;
    if (mapping.access != kReadWrite && (write || mapping.access != kRead)) return false;
    address = start + mapping.num_bytes;
  }
  return true;
}

void copy(void* destination, const void* source, std::size_t num_bytes) {
  {
    Lock lock(state_mutex());
    if (!accessible(destination, num_bytes, true) || !accessible(source, num_bytes, false)) {
      fail_later(kIllegalAddress);
      return;
    }
  }
  std::memcpy(destination, source, num_bytes);
}

bool write_word(void* address, std::uint32_t value) {
  Lock lock(state_mutex());
  const bool allowed = accessible(address, sizeof value, true);
  if (allowed)
    __atomic_store_n(static_cast<std::uint32_t*>(address), value, __ATOMIC_RELEASE);
  else
    fail_later(kIllegalAddress);
  return allowed;
}

bool read_word(const void* address, std::uint32_t* value) {
  Lock lock(state_mutex());
  const bool allowed = accessible(address, sizeof *value, false);
  if (allowed)
    *value = __atomic_load_n(static_cast<const std::uint32_t*>(address), __ATOMIC_ACQUIRE);
  else
    fail_later(kIllegalAddress);
  return allowed;
}

}  // namespace fake

using namespace fake;

FAKE_API Result cuMemGetInfo_v2(std::size_t* free_bytes, std::size_t* total_bytes) {
  return api([&](Lock&) {
    require_context();
    *total_bytes = settings().memory_bytes;
    *free_bytes = *total_bytes - memory().allocated;
  });
}

// Of memory that was mapped here; the host's is not known to the driver.
FAKE_API Result cuPointerGetAttribute(void* result, int attribute, std::uintptr_t address) {
  return api([&](Lock&) {
    constexpr int memory_type = 2, device_ordinal = 9, on_device = 2;
    require_context();
    require(attribute == memory_type || attribute == device_ordinal, kInvalidValue);
    const auto after = memory().mappings.upper_bound(address);
    require(after != memory().mappings.begin(), kInvalidValue);
    const auto& [start, mapping] = *std::prev(after);
    require(address < start + mapping.num_bytes, kInvalidValue);
    const int device = device_of(*mapping.allocation);
    *static_cast<int*>(result) = attribute == memory_type ? on_device : device;
  });
}

FAKE_API Result cuMemGetAllocationGranularity(std::size_t* granularity,
                                              const Properties* properties, int option) {
  return api([&](Lock&) {
    require_pinned_on_device(*properties);
    require(option == 0 || option == 1, kInvalidValue);
    *granularity = granularity_of(properties->handle_types);
  });
}

FAKE_API Result cuMemCreate(std::uint64_t* handle, std::size_t num_bytes,
                            const Properties* properties, unsigned long long flags) {
  return api([&](Lock&) {
    require_context();
    forbid_during_capture();
    require_pinned_on_device(*properties);
    require(flags == 0, kInvalidValue);
    const int kind = properties->handle_types;
    require_multiple(num_bytes, granularity_of(kind));
    require_makeable(kind);
    require(memory().allocated + num_bytes <= settings().memory_bytes, kOutOfMemory);
    const std::string name = kName + std::to_string(properties->location.id);
    const int fd = memfd_create(name.c_str(), MFD_CLOEXEC);
    require(fd >= 0 && ftruncate(fd, static_cast<off_t>(num_bytes)) == 0, kOutOfMemory);
    *handle = add_handle(fd, num_bytes, kind, false);
  });
}

FAKE_API Result cuMemRelease(std::uint64_t handle) {
  return api([&](Lock&) {
    forbid_during_capture();
    allocation_of(handle);
    memory().handles.erase(handle);
  });
}

FAKE_API Result cuMemExportToShareableHandle(void* result, std::uint64_t handle, int kind,
                                             unsigned long long flags) {
  return api([&](Lock&) {
    require_context();
    require(flags == 0, kInvalidValue);
    const Allocation& allocation = *allocation_of(handle);
    require(kind == kHandleFd || kind == kHandleFabric, kInvalidValue);
    require(kind & allocation.handle_types, kInvalidValue);
    if (kind == kHandleFd) {
      *static_cast<int*>(result) = fcntl(allocation.fd, F_DUPFD_CLOEXEC, 0);
      return;
    }
    // The real handle names memory in the whole NVLink domain; this one needs its exporter alive.
    char name[kFabricBytes] = {};
    std::snprintf(name, sizeof name, "/proc/%d/fd/%d", getpid(), allocation.fd);
    std::memcpy(result, name, sizeof name);
  });
}

FAKE_API Result cuMemImportFromShareableHandle(std::uint64_t* handle, void* shared, int kind) {
  return api([&](Lock&) {
    require_context();
    if (kind == kHandleFd) {
      require(settings().posix == 2, kNotSupported);
      *handle = import(static_cast<int>(reinterpret_cast<std::intptr_t>(shared)), kind);
      return;
    }
    require(kind == kHandleFabric, kInvalidValue);
    require(settings().fabric, kNotPermitted);
    const std::string name(static_cast<char*>(shared), strnlen(static_cast<char*>(shared), 64));
    const int fd = open(name.c_str(), O_RDWR | O_CLOEXEC);
    try {
      *handle = import(fd, kind);
    } catch (...) {
      close(fd);
      throw;
    }
    close(fd);
  });
}

FAKE_API Result cuMemAddressReserve(std::uintptr_t* address, std::size_t num_bytes,
                                    std::size_t alignment, std::uintptr_t wanted,
                                    unsigned long long flags) {
  return api([&](Lock&) {
    require_context();
    require(flags == 0 && alignment == 0 && wanted == 0, kInvalidValue);
    require_multiple(num_bytes);
    void* start = mmap(nullptr, num_bytes + kGranularity, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(start != MAP_FAILED, kOutOfMemory);
    const auto raw = reinterpret_cast<std::uintptr_t>(start);
    const std::uintptr_t aligned = (raw + kGranularity - 1) / kGranularity * kGranularity;
    if (aligned != raw) munmap(start, aligned - raw);
    if (aligned != raw + kGranularity)
      munmap(reinterpret_cast<void*>(aligned + num_bytes), raw + kGranularity - aligned);
    memory().reservations[aligned] = num_bytes;
    *address = aligned;
  });
}

FAKE_API Result cuMemAddressFree(std::uintptr_t address, std::size_t num_bytes) {
  return api([&](Lock&) {
    const auto found = memory().reservations.find(address);
    require(found != memory().reservations.end() && found->second == num_bytes, kInvalidValue);
    require(!anything_mapped(address, num_bytes), kInvalidValue);
    memory().reservations.erase(found);
    munmap(reinterpret_cast<void*>(address), num_bytes);
  });
}

// Stricter than the reference: always the whole allocation.
FAKE_API Result cuMemMap(std::uintptr_t address, std::size_t num_bytes, std::size_t offset,
                         std::uint64_t handle, unsigned long long flags) {
  return api([&](Lock&) {
    require_context();
    forbid_during_capture();
    require(flags == 0 && offset == 0, kInvalidValue);
    require_multiple(address);
    const std::shared_ptr<Allocation>& allocation = allocation_of(handle);
    require(num_bytes == allocation->num_bytes, kInvalidValue);
    require(reservation_of(address, num_bytes) != nullptr, kInvalidValue);
    require(!anything_mapped(address, num_bytes), kInvalidValue);
    require(!allocation->imported || num_peer_mappings() < settings().peer_mappings, kOutOfMemory);
    void* mapped = mmap(reinterpret_cast<void*>(address), num_bytes, PROT_NONE,
                        MAP_SHARED | MAP_FIXED, allocation->fd, 0);
    require(mapped != MAP_FAILED, kOutOfMemory);
    memory().mappings[address] = {num_bytes, allocation, 0};
  });
}

FAKE_API Result cuMemUnmap(std::uintptr_t address, std::size_t num_bytes) {
  return api([&](Lock& lock) {
    require_context();
    forbid_during_capture();
    wait_for_everything(lock);
    const auto found = memory().mappings.find(address);
    require(found != memory().mappings.end() && found->second.num_bytes == num_bytes,
            kInvalidValue);
    forbid_access(address, num_bytes);
    memory().mappings.erase(found);
  });
}

FAKE_API Result cuMemSetAccess(std::uintptr_t address, std::size_t num_bytes,
                               const AccessDescription* description, std::size_t count) {
  return api([&](Lock&) {
    require_context();
    forbid_during_capture();
    require(count == 1 && description->location.type == kOnDevice, kInvalidValue);
    require(description->location.id >= 0 && description->location.id < settings().num_devices,
            kInvalidDevice);
    const int access = description->flags;
    require(access == 0 || access == kRead || access == kReadWrite, kInvalidValue);
    require(access != kRead || settings().read_only, kNotSupported);
    const std::uintptr_t end = address + num_bytes;
    std::uintptr_t next = address;  // whole mappings, one after another, without a gap
    while (next < end) {
      const auto found = memory().mappings.find(next);
      require(found != memory().mappings.end(), kInvalidValue);
      next += found->second.num_bytes;
    }
    require(num_bytes != 0 && next == end, kInvalidValue);
    require_access_to_mixed(address, num_bytes);
    for (auto each = memory().mappings.find(address);
         each != memory().mappings.end() && each->first < end; ++each)
      each->second.access = access;
    const int protection =
        access == 0 ? PROT_NONE : access == kRead ? PROT_READ : PROT_READ | PROT_WRITE;
    mprotect(reinterpret_cast<void*>(address), num_bytes, protection);
  });
}

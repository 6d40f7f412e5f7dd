#include "cuda_device.h"

#include <unistd.h>

#include <algorithm>

namespace dwdp::cuda {

PrimaryContext::PrimaryContext(int ordinal) : driver_(Driver::get()) {
  driver_.device_get(&device_, ordinal);
  driver_.primary_retain(&context_, device_);
}

std::string PrimaryContext::close() noexcept {
  std::string failures;
  if (context_ != nullptr) driver_.primary_release.note(failures, device_);
  context_ = nullptr;
  return failures;
}

AllocationProperties Device::properties(int handle_type) const {
  AllocationProperties properties = {};
  properties.type = kAllocationPinned;
  properties.handle_types = handle_type;
  properties.location = {kLocationDevice, ordinal_};
  return properties;
}

std::string Device::name() const {
  char name[128] = {};
  driver().device_name(name, sizeof name, context_.device());
  return name;
}

std::size_t Device::granularity(int handle_types) const {
  const Current current(context_);
  const AllocationProperties pinned = properties(handle_types);
  std::size_t minimum = 0, recommended = 0;
  driver().granularity(&minimum, &pinned, kGranularityMinimum);
  driver().granularity(&recommended, &pinned, kGranularityRecommended);
  return std::max(minimum, recommended);
}

void Device::memory_info(std::size_t* free_bytes, std::size_t* total_bytes) const {
  const Current current(context_);
  driver().memory_info(free_bytes, total_bytes);
}

// What works depends on driver, IMEX daemon and permissions, and the device's attribute knows of none:
// only trying tells.
bool Device::makes_handles(int handle_types) const {
  const Current current(context_);
  const AllocationProperties shared = properties(handle_types);
  std::size_t num_bytes = 0;
  if (driver().granularity.attempt(&num_bytes, &shared, kGranularityRecommended) != kSuccess)
    return false;
  Allocation allocation;
  if (driver().create.attempt(&allocation, num_bytes, &shared, 0) != kSuccess) return false;
  bool exported = true;
  if (handle_types & kHandlePosixFd) {
    int fd = -1;
    exported = driver().export_handle.attempt(&fd, allocation, kHandlePosixFd, 0) == kSuccess;
    if (exported) ::close(fd);
  }
  if (exported && (handle_types & kHandleFabric)) {
    FabricHandle handle;
    exported =
        driver().export_handle.attempt(handle.data(), allocation, kHandleFabric, 0) == kSuccess;
  }
  driver().release(allocation);
  return exported;
}

Allocation Device::create(std::size_t num_bytes, int handle_type) const {
  const Current current(context_);
  const AllocationProperties pinned = properties(handle_type);
  Allocation allocation;
  driver().create(&allocation, num_bytes, &pinned, 0);
  return allocation;
}

void Device::release(Allocation allocation) const {
  const Current current(context_);
  driver().release(allocation);
}

int Device::export_fd(Allocation allocation) const {
  const Current current(context_);
  int fd = -1;
  driver().export_handle(&fd, allocation, kHandlePosixFd, 0);
  return fd;
}

// The driver takes the descriptor by value, in the place of a pointer.
Allocation Device::import_fd(int fd) const {
  const Current current(context_);
  Allocation allocation;
  driver().import_handle(&allocation, reinterpret_cast<void*>(static_cast<std::intptr_t>(fd)),
                         kHandlePosixFd);
  return allocation;
}

FabricHandle Device::export_fabric(Allocation allocation) const {
  const Current current(context_);
  FabricHandle handle;
  driver().export_handle(handle.data(), allocation, kHandleFabric, 0);
  return handle;
}

Allocation Device::import_fabric(FabricHandle handle) const {
  const Current current(context_);
  Allocation allocation;
  driver().import_handle(&allocation, handle.data(), kHandleFabric);
  return allocation;
}

Address Device::reserve(std::size_t num_bytes) const {
  const Current current(context_);
  Address address;
  constexpr std::size_t default_alignment = 0;
  constexpr Address anywhere{};
  driver().reserve(&address, num_bytes, default_alignment, anywhere, 0);
  return address;
}

void Device::free_address(Address address, std::size_t num_bytes) const {
  const Current current(context_);
  driver().address_free(address, num_bytes);
}

void Device::map(Address address, std::size_t num_bytes, Allocation allocation) const {
  const Current current(context_);
  constexpr std::size_t offset = 0;  // the only one that the driver accepts
  driver().map(address, num_bytes, offset, allocation, 0);
}

void Device::unmap(Address address, std::size_t num_bytes) const {
  const Current current(context_);
  driver().unmap(address, num_bytes);
}

void Device::set_access(Address address, std::size_t num_bytes, bool writable) const {
  const Current current(context_);
  const AccessDescription description = {{kLocationDevice, ordinal_},
                                         writable ? kAccessReadWrite : kAccessRead};
  driver().set_access(address, num_bytes, &description, 1);
}

void Device::copy(Address destination, Address source, std::size_t num_bytes) const {
  const Current current(context_);
  driver().context_synchronize();
  driver().copy_between(destination, source, num_bytes);
  driver().context_synchronize();
}

void Device::read(void* destination, Address source, std::size_t num_bytes) const {
  const Current current(context_);
  driver().context_synchronize();
  driver().copy_to_host(destination, source, num_bytes);
}

void Device::write(Address destination, const void* source, std::size_t num_bytes) const {
  const Current current(context_);
  driver().context_synchronize();
  driver().copy_to_device(destination, source, num_bytes);
  driver().context_synchronize();
}

void Device::synchronize() const {
  const Current current(context_);
  driver().context_synchronize();
}

}  // namespace dwdp::cuda

// One CUDA device: its primary context and its virtual memory management.
//
// Allocations are physical memory without an address, reservations are addresses without memory; a
// mapping joins a whole allocation to a part of a reservation. An allocation lives until its
// handles, its exported descriptors and its mappings are gone, in every process.
#pragma once

#include <array>
#include <cstddef>
#include <string>

#include "cuda_driver.h"

namespace dwdp::cuda {

// A reference to a device's primary context, the one that torch uses as well.
class PrimaryContext {
 public:
  explicit PrimaryContext(int ordinal);
  ~PrimaryContext() { close(); }
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  const Driver& driver() const { return driver_; }
  Context handle() const { return context_; }
  DeviceId device() const { return device_; }
  std::string close() noexcept;  // what failed, empty if nothing did

 private:
  const Driver& driver_;
  DeviceId device_ = 0;
  Context context_ = nullptr;
};

// Makes a context current for a scope: the calling thread may have another one, or none.
class Current {
 public:
  explicit Current(const PrimaryContext& context) : driver_(context.driver()) {
    driver_.context_push(context.handle());
  }
  ~Current() {
    Context popped;
    driver_.context_pop.attempt(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Driver& driver_;
};

using FabricHandle = std::array<unsigned char, kFabricHandleBytes>;

class Device {
 public:
  explicit Device(int ordinal) : ordinal_(ordinal), context_(ordinal) {}
  std::string close() noexcept { return context_.close(); }

  std::string name() const;
  std::size_t granularity(int handle_types) const;  // of sizes and addresses
  void memory_info(std::size_t* free_bytes, std::size_t* total_bytes) const;
  bool makes_handles(int handle_types) const;  // by making and exporting a small allocation

  Allocation create(std::size_t num_bytes, int handle_type) const;
  void release(Allocation allocation) const;
  int export_fd(Allocation allocation) const;  // the caller closes it
  Allocation import_fd(int fd) const;          // the caller keeps it
  FabricHandle export_fabric(Allocation allocation) const;
  Allocation import_fabric(FabricHandle handle) const;

  Address reserve(std::size_t num_bytes) const;
  void free_address(Address address, std::size_t num_bytes) const;
  void map(Address address, std::size_t num_bytes, Allocation allocation) const;
  void unmap(Address address, std::size_t num_bytes) const;
  void set_access(Address address, std::size_t num_bytes, bool writable) const;

  // Blocking, after everything the device was given before, on whatever stream. For set-up.
  void copy(Address destination, Address source, std::size_t num_bytes) const;
  void read(void* destination, Address source, std::size_t num_bytes) const;
  void write(Address destination, const void* source, std::size_t num_bytes) const;
  void synchronize() const;

 private:
  const Driver& driver() const { return context_.driver(); }
  AllocationProperties properties(int handle_type) const;

  int ordinal_;
  PrimaryContext context_;
};

}  // namespace dwdp::cuda

"""The typed face of a CUDA device's memory in `libdwdp.so`.

Addresses and allocation handles are the driver's. What was run on hardware is said in docs/gpu.md.
"""

import ctypes
import functools
from typing import Literal

from vllm_dwdp.device.cuda_library import NativeObject, check
from vllm_dwdp.errors import DwdpMemoryError, TransferError

HandleType = Literal["none", "posix_fd", "fabric", "both"]
"""What an allocation can be exported as."""

_HANDLE_TYPES: dict[str, int] = {"none": 0, "posix_fd": 1, "fabric": 8, "both": 1 | 8}
_FABRIC_HANDLE_BYTES = 64
_INVALID_VALUE, _NOT_SUPPORTED = 1, 801


class AccessRefusedError(DwdpMemoryError):
    """The driver refused this access to this range: another kind, or a part of it, may be possible."""


class CudaDevice(NativeObject):
    """One device's memory, in its primary context.

    Memory that was made must be given back before `close`; closing only drops the context.

    Args:
        ordinal: the CUDA device, as counted by this process.

    Raises:
        TransferError: there is no NVIDIA driver, or no such device.
    """

    def __init__(self, ordinal: int) -> None:
        super().__init__("device", f"CUDA device {ordinal}", ordinal)
        self.ordinal = ordinal

    @functools.cached_property
    def name(self) -> str:
        """What the driver calls the device."""
        data = ctypes.create_string_buffer(128)
        status = self._status(self._lib.dwdp_cuda_device_name, data, len(data))
        check(status, f"asking for the name of CUDA device {self.ordinal}", TransferError)
        return data.value.decode()

    @functools.cached_property
    def granularity_bytes(self) -> int:
        """`granularity_of` memory that is not shared."""
        return self.granularity_of("none")

    def granularity_of(self, handle_type: HandleType) -> int:
        """Return the bytes that sizes and addresses of allocations and mappings are multiples of."""
        granularity, kind = ctypes.c_size_t(), _HANDLE_TYPES[handle_type]
        status = self._status(self._lib.dwdp_cuda_granularity, kind, ctypes.byref(granularity))
        self._check_memory(status, "asking for the allocation granularity")
        return granularity.value

    @property
    def total_bytes(self) -> int:
        """Memory of the device."""
        return self._memory_info()[1]

    @property
    def free_bytes(self) -> int:
        """Memory of the device that is not allocated."""
        return self._memory_info()[0]

    def makes_handles(self, handle_type: HandleType) -> bool:
        """Whether an allocation of this type can be made and exported here (tried)."""
        made, kind = ctypes.c_int(), _HANDLE_TYPES[handle_type]
        status = self._status(self._lib.dwdp_cuda_makes_handles, kind, ctypes.byref(made))
        self._check_memory(status, f"probing for memory handles of type {handle_type!r}")
        return bool(made.value)

    def create(self, num_bytes: int, *, handle_type: HandleType) -> int:
        """Allocate memory without an address; the caller releases the handle."""
        handle = ctypes.c_uint64()
        kind = _HANDLE_TYPES[handle_type]
        status = self._status(self._lib.dwdp_cuda_create, num_bytes, kind, ctypes.byref(handle))
        self._check_memory(status, f"allocating {num_bytes} bytes of device memory")
        return handle.value

    def release(self, handle: int) -> None:
        """Give a handle back; the memory lives on while it is mapped or exported."""
        status = self._status(self._lib.dwdp_cuda_release, handle)
        self._check_memory(status, "releasing device memory")

    def export_fd(self, handle: int) -> int:
        """Return a new descriptor of an allocation made for it; the caller closes it."""
        fd = ctypes.c_int()
        status = self._status(self._lib.dwdp_cuda_export_fd, handle, ctypes.byref(fd))
        self._check_memory(status, "exporting device memory as a file descriptor")
        return fd.value

    def import_fd(self, fd: int) -> int:
        """Return a handle of a peer's allocation, to be released; the descriptor stays the caller's."""
        handle = ctypes.c_uint64()
        status = self._status(self._lib.dwdp_cuda_import_fd, fd, ctypes.byref(handle))
        self._check_memory(status, f"importing device memory from file descriptor {fd}")
        return handle.value

    def export_fabric(self, handle: int) -> bytes:
        """Return the 64-byte name, within the NVLink domain, of an allocation made with `fabric`."""
        data = ctypes.create_string_buffer(_FABRIC_HANDLE_BYTES)
        status = self._status(self._lib.dwdp_cuda_export_fabric, handle, data)
        self._check_memory(status, "exporting device memory as a fabric handle")
        return data.raw

    def import_fabric(self, data: bytes) -> int:
        """Return a handle of a peer's allocation, to be released.

        Args:
            data: what the peer's `export_fabric` returned.

        Raises:
            DwdpMemoryError: it has another length, or the driver refuses it.
        """
        if len(data) != _FABRIC_HANDLE_BYTES:
            raise DwdpMemoryError(
                f"a fabric handle of {len(data)} bytes cannot be imported: it must have "
                f"{_FABRIC_HANDLE_BYTES}, as `export_fabric` returns it"
            )
        handle = ctypes.c_uint64()
        status = self._status(self._lib.dwdp_cuda_import_fabric, data, ctypes.byref(handle))
        self._check_memory(status, "importing device memory from a fabric handle")
        return handle.value

    def reserve(self, num_bytes: int) -> int:
        """Return the address of a new range without memory; freed with `free_address`."""
        address = ctypes.c_uint64()
        status = self._status(self._lib.dwdp_cuda_reserve, num_bytes, ctypes.byref(address))
        self._check_memory(status, f"reserving {num_bytes} bytes of device addresses")
        return address.value

    def free_address(self, address: int, num_bytes: int) -> None:
        """Give a whole reserved range back; nothing may be mapped in it."""
        status = self._status(self._lib.dwdp_cuda_free_address, address, num_bytes)
        self._check_memory(status, "freeing device addresses")

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        """Map an allocation from its start; it cannot be touched before `set_access`."""
        status = self._status(self._lib.dwdp_cuda_map, address, num_bytes, handle)
        self._check_memory(status, "mapping device memory")

    def unmap(self, address: int, num_bytes: int) -> None:
        """Undo one `map`, with its address and size. Waits for the device."""
        status = self._status(self._lib.dwdp_cuda_unmap, address, num_bytes)
        self._check_memory(status, "unmapping device memory")

    def set_access(self, address: int, num_bytes: int, *, writable: bool) -> None:
        """Let this device read, or read and write, a range that is mapped without gaps.

        Raises:
            AccessRefusedError: the driver refuses this access, or the range. It is as inaccessible as
                before.
            DwdpMemoryError: any other failure.
        """
        status = self._status(self._lib.dwdp_cuda_set_access, address, num_bytes, writable)
        refused = status in (_INVALID_VALUE, _NOT_SUPPORTED)
        kind = "read and write" if writable else "read-only"
        action = f"setting {kind} access to device memory"
        check(status, action, AccessRefusedError if refused else DwdpMemoryError)

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        """Copy between device addresses; waits for the device before and after (set-up only)."""
        status = self._status(self._lib.dwdp_cuda_copy, destination, source, num_bytes)
        check(status, f"copying {num_bytes} bytes on the device", TransferError)

    def read(self, address: int, num_bytes: int) -> bytes:
        """Return the bytes at a device address, after everything the device was given before."""
        data = ctypes.create_string_buffer(num_bytes)
        status = self._status(self._lib.dwdp_cuda_read, data, address, num_bytes)
        check(status, f"reading {num_bytes} bytes from the device", TransferError)
        return data.raw

    def write(self, address: int, data: bytes) -> None:
        """Put bytes at a device address, after everything the device was given before."""
        status = self._status(self._lib.dwdp_cuda_write, address, data, len(data))
        check(status, f"writing {len(data)} bytes to the device", TransferError)

    def synchronize(self) -> None:
        """Block until the device has done everything it was given."""
        status = self._status(self._lib.dwdp_cuda_synchronize)
        check(status, f"synchronising CUDA device {self.ordinal}", TransferError)

    def _memory_info(self) -> tuple[int, int]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        status = self._status(
            self._lib.dwdp_cuda_memory_info, ctypes.byref(free), ctypes.byref(total)
        )
        self._check_memory(status, "asking for the device's memory")
        return free.value, total.value

    def _check_memory(self, status: int, action: str) -> None:
        check(status, action, DwdpMemoryError)

"""The typed face of the CUDA part of `libdwdp.so`: device memory and the copy queue on a stream.

Importing needs neither a GPU nor a driver; opening a device loads `libcuda.so.1`. Every call makes
the device's primary context (torch's) current in the calling thread and restores what was there. A
failed call raises an error that names the driver call, its arguments and its result. Streams are
CUstream handles, as in `torch.cuda.Stream.cuda_stream`; 0 is the legacy default stream. Addresses
and allocation handles are the driver's. What was run on hardware is said in docs/gpu.md.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Literal, Self

from vllm_dwdp.device.native import Slice, library
from vllm_dwdp.device.queue import Waves
from vllm_dwdp.errors import DwdpError, DwdpMemoryError, TransferError

HandleType = Literal["none", "posix_fd", "fabric", "both"]
"""What an allocation can be exported as."""

_HANDLE_TYPES: dict[str, int] = {"none": 0, "posix_fd": 1, "fabric": 8, "both": 1 | 8}
_FABRIC_HANDLE_BYTES = 64
_INVALID_VALUE, _NOT_SUPPORTED = 1, 801


class AccessRefusedError(DwdpMemoryError):
    """The driver refused this access to this range: another kind, or a part of it, may be possible."""


@functools.cache
def _library() -> ctypes.CDLL:
    lib = library()
    pointer, size, uint64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
    number, unsigned = ctypes.c_int, ctypes.c_uint
    out = ctypes.POINTER
    signatures: dict[str, tuple[object, ...]] = {
        "device_open": (number, out(pointer)),
        "device_close": (pointer,),
        "device_name": (pointer, ctypes.c_char_p, size),
        "granularity": (pointer, number, out(size)),
        "memory_info": (pointer, out(size), out(size)),
        "makes_handles": (pointer, number, out(number)),
        "create": (pointer, size, number, out(uint64)),
        "release": (pointer, uint64),
        "export_fd": (pointer, uint64, out(number)),
        "import_fd": (pointer, number, out(uint64)),
        "export_fabric": (pointer, uint64, ctypes.c_char_p),
        "import_fabric": (pointer, ctypes.c_char_p, out(uint64)),
        "reserve": (pointer, size, out(uint64)),
        "free_address": (pointer, uint64, size),
        "map": (pointer, uint64, size, uint64),
        "unmap": (pointer, uint64, size),
        "set_access": (pointer, uint64, size, number),
        "copy": (pointer, uint64, uint64, size),
        "read": (pointer, ctypes.c_char_p, uint64, size),
        "write": (pointer, uint64, ctypes.c_char_p, size),
        "synchronize": (pointer,),
        "queue_open": (number, number, unsigned, uint64, out(pointer)),
        "queue_close": (pointer,),
        "queue_uses_batch_copy": (pointer,),
        "queue_driver_version": (pointer, out(number)),
        "queue_num_copies": (pointer,),
        "queue_num_overlapping": (pointer,),
        "queue_add_batch": (pointer, out(Slice), out(size), size, out(pointer)),
        "queue_issue": (pointer, pointer, pointer),
        "queue_wait": (pointer, pointer, pointer),
        "queue_record": (pointer, pointer, pointer),
        "queue_capture_record": (pointer, pointer, pointer),
        "queue_capture_fill": (pointer, pointer, pointer, pointer),
        "queue_is_capturing": (pointer, pointer, out(number)),
        "queue_is_done": (pointer, pointer, out(number)),
        "queue_drain": (pointer,),
    }
    for name, arguments in signatures.items():
        getattr(lib, f"dwdp_cuda_{name}").argtypes = arguments
    for name in ("num_copies", "num_overlapping"):
        getattr(lib, f"dwdp_cuda_queue_{name}").restype = size
    return lib


def _check(status: int, action: str, error: type[DwdpError]) -> None:
    if status:
        raise error(f"{action} failed: {library().dwdp_last_error().decode()}")


class _Native:
    """An object of the library, from its opening function to its closing one.

    Raises:
        TransferError: it cannot be opened.
    """

    def __init__(self, kind: str, name: str, *arguments: object) -> None:
        self._lib = _library()
        self._name = name
        self._close = getattr(self._lib, f"dwdp_cuda_{kind}_close")
        handle = ctypes.c_void_p()
        status = getattr(self._lib, f"dwdp_cuda_{kind}_open")(*arguments, ctypes.byref(handle))
        _check(status, f"opening {name}", TransferError)
        self._handle: ctypes.c_void_p | None = handle

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish what was started and free it; again is harmless.

        Raises:
            TransferError: steps of it failed, all of which are named; it is closed anyway.
        """
        if self._handle is not None:
            handle, self._handle = self._handle, None
            _check(self._close(handle), f"closing {self._name}", TransferError)

    def _status(self, function: Callable[..., int], *arguments: object) -> int:
        assert self._handle is not None, f"{self._name} is closed"
        return function(self._handle, *arguments)


class CudaDevice(_Native):
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
        _check(status, f"asking for the name of CUDA device {self.ordinal}", TransferError)
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
        """Memory of the device that nobody has allocated."""
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
        """Return a handle of a peer's allocation, to be released."""
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
        _check(status, action, AccessRefusedError if refused else DwdpMemoryError)

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        """Copy between device addresses; waits for the device before and after (set-up only)."""
        status = self._status(self._lib.dwdp_cuda_copy, destination, source, num_bytes)
        _check(status, f"copying {num_bytes} bytes on the device", TransferError)

    def read(self, address: int, num_bytes: int) -> bytes:
        """Return the bytes at a device address, after everything the device was given before."""
        data = ctypes.create_string_buffer(num_bytes)
        status = self._status(self._lib.dwdp_cuda_read, data, address, num_bytes)
        _check(status, f"reading {num_bytes} bytes from the device", TransferError)
        return data.raw

    def write(self, address: int, data: bytes) -> None:
        """Put bytes at a device address, after everything the device was given before."""
        status = self._status(self._lib.dwdp_cuda_write, address, data, len(data))
        _check(status, f"writing {len(data)} bytes to the device", TransferError)

    def synchronize(self) -> None:
        """Block until the device has done everything it was given."""
        status = self._status(self._lib.dwdp_cuda_synchronize)
        _check(status, f"synchronising CUDA device {self.ordinal}", TransferError)

    def _memory_info(self) -> tuple[int, int]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        status = self._status(
            self._lib.dwdp_cuda_memory_info, ctypes.byref(free), ctypes.byref(total)
        )
        self._check_memory(status, "asking for the device's memory")
        return free.value, total.value

    def _check_memory(self, status: int, action: str) -> None:
        _check(status, action, DwdpMemoryError)


class CudaCopyQueue(_Native):
    """A copy stream of its own with two events per batch: `ready` and `consumed`.

    Nothing blocks the host but `drain` and `close`. One thread drives a queue. Batches are handles
    that live as long as the queue; a graph that captured anything of it must not be launched after
    `close`. The timelines are drawn in `csrc/cuda_queue.h`.

    Args:
        device: whose context the stream belongs to; may be closed before the queue.
        max_delay_us: sleep up to this long on the copy stream before each fill (tests).
        poison: overwrite a slot with 0xff before each fill (tests).
        seed: of the delays.

    Raises:
        TransferError: a driver call failed.
    """

    def __init__(
        self, device: CudaDevice, *, max_delay_us: int = 0, poison: bool = False, seed: int = 0
    ) -> None:
        name = f"a copy stream on CUDA device {device.ordinal}"
        super().__init__("queue", name, device.ordinal, poison, max_delay_us, seed)

    @property
    def uses_batch_copy(self) -> bool:
        """Whether a wave is one driver call (CUDA 12.8 or later); otherwise one per slice."""
        return bool(self._status(self._lib.dwdp_cuda_queue_uses_batch_copy))

    @functools.cached_property
    def driver_version(self) -> str:
        """The newest CUDA that the driver serves, e.g. `13.1`."""
        version = ctypes.c_int()
        self._call(
            self._lib.dwdp_cuda_queue_driver_version,
            "asking for the driver's version",
            ctypes.byref(version),
        )
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    @property
    def num_copies(self) -> int:
        """Slices of all batches."""
        return self._status(self._lib.dwdp_cuda_queue_num_copies)

    @property
    def num_overlapping(self) -> int:
        """Of these, those that ask for a copy engine: from other devices' memory or the host's."""
        return self._status(self._lib.dwdp_cuda_queue_num_overlapping)

    def describe(self) -> str:
        """How it copies, which every measured speed depends on."""
        return (
            f"CUDA driver {self.driver_version}, "
            f"{'a batch call a wave' if self.uses_batch_copy else 'a call a slice'}, overlap flag on "
            f"{self.num_overlapping} of {self.num_copies} slices"
        )

    def add_batch(self, waves: Waves) -> int:
        """Register `(destination, source, num_bytes)` copies; returns the batch's handle.

        No two copies of a batch may overlap. Those of a wave run in any order; wave follows wave. A
        batch counts as filled and consumed until it is issued for the first time.
        """
        slices = [Slice(*entry) for wave in waves for entry in wave]
        array = (Slice * len(slices))(*slices)
        wave_sizes = (ctypes.c_size_t * len(waves))(*map(len, waves))
        batch = ctypes.c_void_p()
        self._call(
            self._lib.dwdp_cuda_queue_add_batch,
            "registering a batch of copies",
            array,
            wave_sizes,
            len(waves),
            ctypes.byref(batch),
        )
        return batch.value or 0

    def issue(self, batch: int, after: int | None) -> None:
        """Fill a batch's slot once `after`, the batch that used the slot last, is consumed.

        Raises:
            TransferError: the copy stream is part of a capture, from which the copies would be missing.
        """
        self._call(self._lib.dwdp_cuda_queue_issue, "issuing copies", batch, after)

    def wait(self, batch: int, stream: int) -> None:
        """Make `stream`, which is not capturing, wait for the batch's last fill."""
        self._call(self._lib.dwdp_cuda_queue_wait, "waiting for copies", batch, stream)

    def record(self, batch: int, stream: int) -> None:
        """Mark the batch consumed once `stream`, not capturing, has done what it was given so far."""
        self._call(self._lib.dwdp_cuda_queue_record, "recording a consumed slot", batch, stream)

    def capture_record(self, batch: int, stream: int) -> None:
        """Remember the point of the running capture at which the batch was consumed."""
        self._call(
            self._lib.dwdp_cuda_queue_capture_record,
            "marking a consumed slot in a graph",
            batch,
            stream,
        )

    def capture_fill(self, batch: int, after: int, stream: int) -> None:
        """Capture the batch's copies as a branch from `after`'s `capture_record` point to here.

        What `stream` captures from now on waits for the copies; what it captured since that point
        runs beside them. Fills of one capture run one after another, in the order of these calls, and
        each is one node for every run of bytes, whatever slices it was cut into.

        Raises:
            TransferError: `stream` is not capturing, or `after` has no point in this capture.
        """
        self._call(self._lib.dwdp_cuda_queue_capture_fill, "capturing copies", batch, after, stream)

    def is_capturing(self, stream: int) -> bool:
        """Whether `stream` is capturing a graph (or one that was spoilt and not ended yet)."""
        capturing = ctypes.c_int()
        self._call(
            self._lib.dwdp_cuda_queue_is_capturing,
            "asking whether a stream is capturing",
            stream,
            ctypes.byref(capturing),
        )
        return bool(capturing.value)

    def is_done(self, batch: int) -> bool:
        """Whether the batch's last issued fill is complete."""
        done = ctypes.c_int()
        self._call(
            self._lib.dwdp_cuda_queue_is_done,
            "asking whether copies are done",
            batch,
            ctypes.byref(done),
        )
        return bool(done.value)

    def drain(self) -> None:
        """Block until the copy stream is idle."""
        self._call(self._lib.dwdp_cuda_queue_drain, "draining the copy stream")

    def _call(self, function: Callable[..., int], action: str, *arguments: object) -> None:
        _check(self._status(function, *arguments), action, TransferError)

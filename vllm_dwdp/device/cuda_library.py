"""The declarations of the CUDA part of `libdwdp.so`, and what its objects and errors have in common.

Importing needs neither a GPU nor a driver; opening a device or a queue loads `libcuda.so.1`. Every call
makes the device's primary context (torch's) current in the calling thread and restores what was there. A
failed call raises an error that names the driver call, its arguments and its result.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Self

from vllm_dwdp.device.native import Slice, library
from vllm_dwdp.errors import DwdpError, TransferError


@functools.cache
def cuda_library() -> ctypes.CDLL:
    """Return the library with the types of its CUDA functions; as `native.library`."""
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


def check(status: int, action: str, error: type[DwdpError]) -> None:
    """Raise `error`, with the library's own words, unless `status` is 0.

    Args:
        status: what a function of the library returned.
        action: what the function was to do, as the subject of "… failed".
        error: the class to raise.
    """
    if status:
        raise error(f"{action} failed: {library().dwdp_last_error().decode()}")


class NativeObject:
    """An object of the library, from its opening function to its closing one.

    Raises:
        TransferError: it cannot be opened.
    """

    def __init__(self, kind: str, name: str, *arguments: object) -> None:
        self._lib = cuda_library()
        self._name = name
        self._close = getattr(self._lib, f"dwdp_cuda_{kind}_close")
        handle = ctypes.c_void_p()
        status = getattr(self._lib, f"dwdp_cuda_{kind}_open")(*arguments, ctypes.byref(handle))
        check(status, f"opening {name}", TransferError)
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
            check(self._close(handle), f"closing {self._name}", TransferError)

    def _status(self, function: Callable[..., int], *arguments: object) -> int:
        assert self._handle is not None, f"{self._name} is closed"
        return function(self._handle, *arguments)

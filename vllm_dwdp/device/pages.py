"""Pages of files as address ranges of this process, by mmap: one file's, or several files' as one range.

Sources: mmap(2) MAP_FIXED, MAP_NORESERVE.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from vllm_dwdp.device.base import Segment
from vllm_dwdp.errors import DwdpMemoryError
from vllm_dwdp.logger import format_gib

PAGE_BYTES = mmap.PAGESIZE

_MAP_FAILED = ctypes.c_void_p(-1).value
_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True)
class Mapping:
    """An address range of this process. Its maker calls `unmap` once.

    Args:
        address: first byte.
        num_bytes: length, a multiple of the page size.
    """

    address: int
    num_bytes: int

    def unmap(self) -> None:
        """Give the range back. Tensors over it must be gone."""
        if _libc.munmap(self.address, self.num_bytes):
            _raise_errno(f"munmap of {self.num_bytes} bytes at {self.address:#x}")


def map_pages(fd: int, offset: int, num_bytes: int, *, writable: bool) -> Mapping:
    """Map `num_bytes` of `fd`, shared; the fd may be closed afterwards.

    Raises:
        DwdpMemoryError: the kernel refuses (`vm.max_map_count`, a sealed fd, no address space).
    """
    return Mapping(_mmap(0, num_bytes, fd, offset, writable=writable, flags=0), num_bytes)


def map_composite(segments: Sequence[Segment], num_bytes: int) -> Mapping:
    """Assemble an address range from pages of several files, as `Device.map_composite`."""
    address = _check_address(
        _libc.mmap(
            None,
            num_bytes,
            _PROT_NONE,
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
            -1,
            0,
        ),
        f"mmap of an address range of {format_gib(num_bytes)}",
    )
    reserved = Mapping(address, num_bytes)
    with ExitStack() as undo:
        undo.callback(reserved.unmap)
        for segment in segments:
            _mmap(
                address + segment.span.start,
                len(segment.span),
                segment.backing.fd,
                segment.offset,
                writable=segment.writable,
                flags=_MAP_FIXED,
            )
        undo.pop_all()
    return reserved


def _mmap(address: int, num_bytes: int, fd: int, offset: int, *, writable: bool, flags: int) -> int:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    result = _libc.mmap(address, num_bytes, protection, mmap.MAP_SHARED | flags, fd, offset)
    return _check_address(result, f"mmap of {format_gib(num_bytes)} of shared expert memory")


def _check_address(address: int | None, action: str) -> int:
    if address is None or address == _MAP_FAILED:
        _raise_errno(action)
    assert address is not None
    return address


def _raise_errno(action: str) -> None:
    code = ctypes.get_errno()
    raise DwdpMemoryError(
        f"{action} failed: {os.strerror(code)} (errno {code}). If it says 'Cannot allocate memory', "
        "raise the sysctl vm.max_map_count."
    )

"""Which bytes of a file have been read: those that the page cache holds after it was emptied."""

import ctypes
import mmap
import os
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def drop(path: Path) -> None:
    """Forget the file's pages (after writing them back)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def cached_bytes(path: Path) -> int:
    """Bytes of the file in the page cache."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as view:
        pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        address = _address(view)
        if _libc.mincore(address, size, pages):
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(byte & 1 for byte in pages.raw) * mmap.PAGESIZE


def _address(view: mmap.mmap) -> int:
    import numpy as np

    return int(np.frombuffer(view, np.uint8).ctypes.data)

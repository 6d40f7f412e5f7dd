"""The typed face of `libdwdp.so` (sources in `csrc/`), loaded on first use.

Its CUDA part is in `device.cuda_library`, `device.cuda_driver` and `device.cuda_copies`.

Every call releases the GIL (ctypes) and takes about a microsecond. Importing this module needs no
library.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

from vllm_dwdp.device.queue import Waves
from vllm_dwdp.errors import NativeLibraryError, TransferError

ABI_VERSION = 6
LIBRARY_PATH = Path(__file__).with_name("libdwdp.so")

_BUILD = "Build it with `make native` in a checkout, or reinstall with `pip install -e .`"


class Slice(ctypes.Structure):
    """One contiguous copy: destination address, source address, bytes."""

    _fields_ = (
        ("destination", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("num_bytes", ctypes.c_size_t),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Return the loaded library.

    Raises:
        NativeLibraryError: it is missing, cannot be loaded, or belongs to another version.
    """
    if not LIBRARY_PATH.exists():
        raise NativeLibraryError(f"the copy engine {LIBRARY_PATH} is not built. {_BUILD}.")
    try:
        lib = ctypes.CDLL(str(LIBRARY_PATH))
        version = lib.dwdp_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(
            f"the copy engine {LIBRARY_PATH} cannot be loaded: {error}. {_BUILD}."
        ) from error
    if version != ABI_VERSION:
        raise NativeLibraryError(
            f"the copy engine {LIBRARY_PATH} has ABI {version}, this version needs {ABI_VERSION}. "
            f"{_BUILD}."
        )
    _declare(lib)
    return lib


def _declare(lib: ctypes.CDLL) -> None:
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    signatures: dict[str, tuple[object, tuple[object, ...]]] = {
        "dwdp_last_error": (ctypes.c_char_p, ()),
        "dwdp_queue_create": (
            pointer,
            (
                ctypes.c_uint,
                ctypes.POINTER(ctypes.c_int),
                ctypes.c_uint,
                ctypes.c_uint,
                ctypes.c_uint64,
            ),
        ),
        "dwdp_queue_destroy": (None, (pointer,)),
        "dwdp_queue_add_batch": (pointer, (pointer, ctypes.POINTER(Slice), size)),
        "dwdp_queue_issue": (None, (pointer, pointer)),
        "dwdp_queue_drain": (None, (pointer,)),
        "dwdp_queue_busy_ns": (ctypes.c_uint64, (pointer,)),
        "dwdp_batch_wait": (ctypes.c_double, (pointer,)),
        "dwdp_batch_done": (ctypes.c_int, (pointer,)),
        "dwdp_stream_copy": (None, (pointer, pointer, size)),
        "dwdp_sum_pieces": (None, (pointer, size, ctypes.c_char_p, size, pointer)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments


def sum_pieces(address: int, num_words: int, keys: bytes, piece_words: int) -> bytes:
    """Return the sums of `device.digest` over words in host memory, two little-endian words a piece."""
    num_pieces = -(-num_words // piece_words)
    sums = (ctypes.c_uint64 * (2 * num_pieces))()
    library().dwdp_sum_pieces(address, num_words, keys, piece_words, sums)
    return bytes(sums)


class NativeQueue:
    """A native copy queue and its threads; `close` finishes what was issued and ends them.

    Args:
        num_threads: copying threads.
        cpus: the CPU of each thread, or None to leave them to the kernel.
        poison: overwrite a slot with 0xff before each fill (tests).
        max_delay_us: sleep up to this long before each slice (tests).
        seed: of the delays.
    """

    def __init__(
        self,
        num_threads: int,
        cpus: Sequence[int] | None = None,
        *,
        poison: bool = False,
        max_delay_us: int = 0,
        seed: int = 0,
    ) -> None:
        self._lib = library()
        self.num_threads = num_threads
        array = (ctypes.c_int * num_threads)(*cpus) if cpus is not None else None
        self._handle = self._lib.dwdp_queue_create(num_threads, array, poison, max_delay_us, seed)
        self._check(self._handle, "creating the copy threads")

    def add_batch(self, waves: Waves) -> int:
        """Register the copies of one layer, which threads take in this order; returns a handle."""
        slices = [Slice(*entry) for wave in waves for entry in wave]
        array = (Slice * len(slices))(*slices)
        batch: int = self._lib.dwdp_queue_add_batch(self._handle, array, len(slices))
        self._check(batch, "registering a batch of copies")
        return batch

    def issue(self, batch: int) -> None:
        """Start a fill; the previous fill of the batch must be complete."""
        self._lib.dwdp_queue_issue(self._handle, batch)

    def wait(self, batch: int) -> float:
        """Sleep until the batch's last fill is complete; returns the seconds slept."""
        seconds: float = self._lib.dwdp_batch_wait(batch)
        return seconds

    def is_done(self, batch: int) -> bool:
        """Whether the batch's last fill is complete."""
        return bool(self._lib.dwdp_batch_done(batch))

    def drain(self) -> None:
        """Sleep until nothing is queued or running."""
        self._lib.dwdp_queue_drain(self._handle)

    @property
    def busy_seconds(self) -> float:
        """Thread seconds spent copying."""
        return int(self._lib.dwdp_queue_busy_ns(self._handle)) / 1e9

    def close(self) -> None:
        """End the threads; batches must not be used any more."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self._lib.dwdp_queue_destroy(handle)

    def _check(self, result: int | None, action: str) -> None:
        if not result:
            raise TransferError(f"{action} failed: {self._lib.dwdp_last_error().decode()}")

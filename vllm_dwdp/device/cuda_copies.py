"""The typed face of the copy queue on a CUDA stream in `libdwdp.so`.

Streams are CUstream handles, as in `torch.cuda.Stream.cuda_stream`; 0 is the legacy default stream. What
was run on hardware is said in docs/gpu.md.
"""

import ctypes
import functools
from collections.abc import Callable

from vllm_dwdp.device.cuda_driver import CudaDevice
from vllm_dwdp.device.cuda_library import NativeObject, check
from vllm_dwdp.device.native import Slice
from vllm_dwdp.device.queue import Waves
from vllm_dwdp.errors import TransferError


class CudaCopyQueue(NativeObject):
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
        version = self._ask(
            self._lib.dwdp_cuda_queue_driver_version, "asking for the driver's version"
        )
        return f"{version // 1000}.{version % 1000 // 10}"

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
        action = "asking whether a stream is capturing"
        return bool(self._ask(self._lib.dwdp_cuda_queue_is_capturing, action, stream))

    def is_done(self, batch: int) -> bool:
        """Whether the batch's last issued fill is complete."""
        action = "asking whether copies are done"
        return bool(self._ask(self._lib.dwdp_cuda_queue_is_done, action, batch))

    def drain(self) -> None:
        """Block until the copy stream is idle."""
        self._call(self._lib.dwdp_cuda_queue_drain, "draining the copy stream")

    def _ask(self, function: Callable[..., int], action: str, *arguments: object) -> int:
        """Return what the library writes into the last argument."""
        answer = ctypes.c_int()
        self._call(function, action, *arguments, ctypes.byref(answer))
        return answer.value

    def _call(self, function: Callable[..., int], action: str, *arguments: object) -> None:
        check(self._status(function, *arguments), action, TransferError)

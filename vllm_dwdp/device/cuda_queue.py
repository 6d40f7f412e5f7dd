"""The CUDA device's copy queue: one copy stream, ordered against whatever stream torch computes on.

Implements `device.queue.GraphQueue`. Nothing here blocks the host but `drain` and `close`.
"""

import os
from collections.abc import Callable

import torch

from vllm_dwdp.device.cuda_copies import CudaCopyQueue
from vllm_dwdp.device.cuda_driver import CudaDevice
from vllm_dwdp.device.host_queue import DELAY_ENV, POISON_ENV
from vllm_dwdp.device.queue import Waves


def _torch_stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


class CudaQueue:
    """A `CudaCopyQueue` that waits and records on the current stream.

    Slices are large, because each costs the thread that launches kernels half a microsecond, and small
    enough that a layer reads from every peer in turns many times: DeepSeek-R1 in NVFP4 on four ranks has
    144 in 48 waves.

    Args:
        device: whose memory is copied.
        current_stream: the stream, a CUstream, that the calling thread computes on.

    `DWDP_DEBUG_POISON` and `DWDP_DEBUG_MAX_DELAY_US` provoke races, as on the host.
    """

    slice_bytes = 32 * 2**20

    def __init__(
        self, device: CudaDevice, current_stream: Callable[[], int] = _torch_stream
    ) -> None:
        self._current_stream = current_stream
        self._queue = CudaCopyQueue(
            device,
            poison=os.environ.get(POISON_ENV) == "1",
            max_delay_us=int(os.environ.get(DELAY_ENV, "0")),
        )

    def add_batch(self, waves: Waves) -> int:
        """Register the copies of one layer: a driver call each wave."""
        return self._queue.add_batch(waves)

    def issue(self, batch: int, after: int | None) -> None:
        """Enqueue a fill behind the `record` of `after`."""
        self._queue.issue(batch, after)

    def wait(self, batch: int) -> float:
        """Make the current stream wait for the fill; the host never sleeps."""
        self._queue.wait(batch, self._current_stream())
        return 0.0

    def record(self, batch: int) -> None:
        """Mark the slot as consumed, in the order of the current stream."""
        self._queue.record(batch, self._current_stream())

    def is_capturing(self) -> bool:
        """Whether the current stream captures a graph."""
        return self._queue.is_capturing(self._current_stream())

    def capture_record(self, batch: int) -> None:
        """Record a mark for `capture_fill`."""
        self._queue.capture_record(batch, self._current_stream())

    def capture_fill(self, batch: int, after: int) -> None:
        """Copy nodes in a branch from the mark of `after` to here."""
        self._queue.capture_fill(batch, after, self._current_stream())

    def describe(self) -> str:
        """Driver, calls and flag."""
        return self._queue.describe()

    def drain(self) -> None:
        """Block until the copy stream is idle."""
        self._queue.drain()

    @property
    def busy_seconds(self) -> None:
        """Not measured: events without timing are cheaper, and the copy engines need no thread."""

    def close(self) -> None:
        """Finish what was issued and release the stream."""
        self._queue.close()

"""The seam between the schedule and a device: what a copy queue must do.

Two implementations: native threads on the host (`host_queue`), a stream and events on CUDA
(`cuda_queue`). On the host `wait` blocks and kernels have returned when `record` is called; on CUDA
both only enqueue, so whatever refills a slot must be told after which layer it may.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

ResolvedSlice = tuple[int, int, int]
"""(destination address, source address, num_bytes)."""

Waves = Sequence[Sequence[ResolvedSlice]]
"""The copies of one layer: wave after wave; within a wave at most one from each peer, in any order."""


class CopyQueue(Protocol):
    """Copies batches of slices in the background. A batch is registered once, filled every step."""

    @property
    def slice_bytes(self) -> int:
        """Into what size of slices this device's copies are best cut, unless the user says."""

    def add_batch(self, waves: Waves) -> int:
        """Register the copies of one layer; returns a handle."""

    def issue(self, batch: int, after: int | None) -> None:
        """Start a fill and return; the batch's previous fill is complete, or ordered before.

        Args:
            after: the batch whose layer last used the slot; the copies wait for its `record`.
        """

    def wait(self, batch: int) -> float:
        """Make what follows wait for the batch's last fill; returns the seconds the host slept."""

    def record(self, batch: int) -> None:
        """Note that the kernels that read the batch's slot are done (host) or enqueued (CUDA)."""

    def drain(self) -> None:
        """Block the host until nothing is queued or running."""

    def describe(self) -> str:
        """How it copies, in words that belong beside a measured speed."""

    @property
    def busy_seconds(self) -> float | None:
        """Seconds spent copying; None where a device does not measure it."""

    def close(self) -> None:
        """Finish what was issued and release the queue; its batches must not be used any more."""


@runtime_checkable
class GraphQueue(CopyQueue, Protocol):
    """A copy queue whose copies can become nodes of a graph that is being captured."""

    def is_capturing(self) -> bool:
        """Whether the current stream captures a graph."""

    def capture_record(self, batch: int) -> None:
        """Mark the point of the capture at which the batch's layer was consumed."""

    def capture_fill(self, batch: int, after: int) -> None:
        """Nodes that fill `batch` as soon as the mark of `after` is reached; what follows waits."""

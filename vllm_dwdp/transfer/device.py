"""The seam between the schedule and a device: what a copy queue must do.

Two implementations: native threads on the host (`host_queue`), and streams and events on CUDA.
"""

from collections.abc import Sequence
from typing import Protocol

ResolvedSlice = tuple[int, int, int]
"""(destination address, source address, num_bytes)."""


class CopyQueue(Protocol):
    """Copies batches of slices in the background. A batch is registered once, filled every step."""

    def add_batch(self, slices: Sequence[ResolvedSlice]) -> int:
        """Register the copies of one layer; returns a handle."""

    def issue(self, batch: int) -> None:
        """Start a fill and return; the batch's previous fill is complete."""

    def wait(self, batch: int) -> float:
        """Make what follows wait for the batch's last fill; returns the seconds the host slept."""

    def drain(self) -> None:
        """Block the host until nothing is queued or running."""

    @property
    def busy_seconds(self) -> float:
        """Seconds spent copying."""

"""The host device's copy queue: native threads, configured from the cores this process may use."""

import os

from vllm_dwdp.device.native import NativeQueue

POISON_ENV = "DWDP_DEBUG_POISON"
DELAY_ENV = "DWDP_DEBUG_MAX_DELAY_US"


class HostCopyQueue(NativeQueue):
    """Implements `device.queue.CopyQueue`: a `NativeQueue` with this host's defaults.

    A slice is what a thread takes at a time, so slices are small: they share a layer among the threads,
    and the end of a fill waits for the last of them. Taking one costs a lock, against a copy of 2 MiB
    nothing.

    Args:
        num_threads: copying threads; by default one for every four cores, at least one.
        cpus: the CPU of each thread, or None to leave them to the kernel.

    The environment variables `DWDP_DEBUG_POISON=1` and `DWDP_DEBUG_MAX_DELAY_US=n` provoke races:
    a slot is overwritten before each fill, and every slice starts late by a random time.
    """

    slice_bytes = 2 * 2**20

    def __init__(self, num_threads: int | None = None, cpus: list[int] | None = None) -> None:
        super().__init__(
            num_threads or max(1, len(os.sched_getaffinity(0)) // 4),
            cpus,
            poison=os.environ.get(POISON_ENV) == "1",
            max_delay_us=int(os.environ.get(DELAY_ENV, "0")),
        )

    def issue(self, batch: int, after: int | None = None) -> None:
        """Start a fill; kernels have returned when a layer is recorded, so `after` says nothing."""
        super().issue(batch)

    def record(self, batch: int) -> None:
        """Nothing: see `issue`."""

    def describe(self) -> str:
        """Return the threads."""
        return f"{self.num_threads} copying threads"

    def __enter__(self) -> "HostCopyQueue":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

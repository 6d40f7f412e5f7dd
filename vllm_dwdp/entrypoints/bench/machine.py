"""The machine that a figure was measured on, in one line, and what else it did meanwhile."""

import contextlib
import os
import platform
import time
from collections.abc import Iterable
from datetime import UTC, datetime

import psutil


def describe_machine() -> str:
    """CPU, cores, memory, kernel and date, for the head of every table."""
    memory_gib = psutil.virtual_memory().total / 2**30
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    cores = len(os.sched_getaffinity(0))
    return f"{_cpu_name()}, {cores} cores, {memory_gib:.0f} GiB, {platform.release()}, {date}"


class OtherWork:
    """How many cores processes that are not ours kept busy since it was made, on average.

    Args:
        ours: processes that are measured; they must live until `cores` is asked.
    """

    def __init__(self, ours: Iterable[psutil.Process]) -> None:
        self._ours = list(ours)
        self._since = time.monotonic()
        self._before = self._seconds()

    def cores(self) -> float:
        """Not less than zero: the kernel counts both sides in ticks of its own."""
        return max(0.0, (self._seconds() - self._before) / (time.monotonic() - self._since))

    def _seconds(self) -> float:
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - getattr(times, "iowait", 0.0)
        # Time of guests is counted in user time already.
        busy -= getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        for process in self._ours:
            with contextlib.suppress(psutil.Error):
                spent = process.cpu_times()
                busy -= spent.user + spent.system
        return float(busy)


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()

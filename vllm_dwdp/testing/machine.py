"""The machine that a figure was measured on, in one line."""

import os
import platform
from datetime import UTC, datetime

import psutil


def describe_machine() -> str:
    """CPU, cores, memory, kernel and date, for the head of every table."""
    memory_gib = psutil.virtual_memory().total / 2**30
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    cores = len(os.sched_getaffinity(0))
    return f"{_cpu_name()}, {cores} cores, {memory_gib:.0f} GiB, {platform.release()}, {date}"


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()

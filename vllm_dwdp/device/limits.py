"""What this process has, and may still take: cores, memory and open files of the host or container."""

import ctypes
import os
import resource
from collections.abc import Callable
from pathlib import Path

import psutil

from vllm_dwdp.device.container import read_free_memory
from vllm_dwdp.errors import DwdpMemoryError
from vllm_dwdp.logger import format_gib

_FILES_PER_PEER = 4  # the peer's shard, a hello each way, a status request
_FILES_AROUND = 64  # checkpoint files, sockets, the slots, and what vLLM opens meanwhile


ONLINE_CPUS = Path("/sys/devices/system/cpu/online")


def is_confined() -> bool:
    """Whether this process may not use some CPU of this machine: `taskset`, or a container's cpuset."""
    return len(os.sched_getaffinity(0)) < _num_online_cpus()


def _num_online_cpus() -> int:
    """CPUs of the machine; glibc's count, and so Python's, may be of those that are allowed."""
    spans = [span.split("-") for span in ONLINE_CPUS.read_text().strip().split(",")]
    return sum(int(span[-1]) - int(span[0]) + 1 for span in spans)


def check_available(num_bytes: int, purpose: str) -> None:
    """Refuse before the kernel's out-of-memory killer does.

    Raises:
        DwdpMemoryError: less than `num_bytes` are available to this process.
    """
    available = available_bytes()
    if num_bytes > available:
        raise DwdpMemoryError(
            f"{purpose} needs {format_gib(num_bytes)} but only {format_gib(available)} of memory "
            "are available. Use more ranks per group, free memory on this host, or raise the "
            "container's memory limit."
        )


def check_open_files(num_files: int, purpose: str) -> None:
    """Refuse before a file descriptor runs out in the middle of a start or of serving.

    Raises:
        DwdpMemoryError: fewer than `num_files` more may be opened by this process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + num_files
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard == resource.RLIM_INFINITY or needed <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return
    raise DwdpMemoryError(
        f"RLIMIT_NOFILE is {soft} (hard limit {hard}), but {purpose} needs {needed} open files in "
        f"this process. Raise it, e.g. with `ulimit -n {max(65536, needed)}` or LimitNOFILE= of a "
        "systemd unit."
    )


def files_needed(group_size: int, num_handles: int = 0) -> int:
    """Files that a rank opens for a group of `group_size`, whose shards have `num_handles` handles.

    Each handle is open as received, as held for others, and on its way to a peer.
    """
    return _FILES_PER_PEER * group_size + _FILES_AROUND + 3 * num_handles


def available_bytes() -> int:
    """Memory this process may still take: the host's, or its container's when that is less."""
    available = int(psutil.virtual_memory().available)
    allowed = read_free_memory()
    return available if allowed is None else min(available, allowed)


def proportional_set_bytes(pid: int | str = "self") -> int:
    """Proportional set size: shared pages count once over all processes that map them."""
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        for line in rollup:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("smaps_rollup has no Pss line")


def release_free_heap() -> None:
    """Return what malloc keeps of freed weights to the kernel (glibc; elsewhere nothing)."""
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

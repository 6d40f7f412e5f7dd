"""What a container or a systemd unit allows this process, as cgroup files (v2 or v1) tell it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED_BYTES = 2**60
"""cgroup v1 writes "no limit" as a huge number."""

_MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")
_MEMORY_USED = ("memory.current", "memory.usage_in_bytes")
_MEMORY_CACHE = (("inactive_file", "active_file"), ("total_inactive_file", "total_active_file"))
"""Of `memory.stat`: pages of files, which the kernel takes back when memory runs short."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The tightest limit of each kind over this process's cgroup and those above; None: none.

    Args:
        memory_bytes: of all its processes together, shared memory included.
        num_tasks: processes and threads.
        num_cpus: CPU time per time.
    """

    memory_bytes: int | None = None
    num_tasks: int | None = None
    num_cpus: float | None = None


def read_limits(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Limits:
    """Return the limits of this process; what cannot be read counts as no limit."""
    folders = _folders(root, membership)
    return Limits(
        memory_bytes=_tightest(folders["memory"], _memory_limit),
        num_tasks=_tightest(folders["pids"], lambda folder: _number_in(folder, ("pids.max",))),
        num_cpus=min(filter(None, map(_cpu_share, folders["cpu"])), default=None),
    )


def read_free_memory(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes that the limits still leave, file cache counted as free; None: no limit."""
    return _tightest(_folders(root, membership)["memory"], _free_memory)


def _folders(root: Path, membership: Path) -> dict[str, list[Path]]:
    """For each controller, this process's folder and all above it."""
    found: dict[str, list[Path]] = {name: [root] for name in ("memory", "pids", "cpu")}
    for line in _read(membership).splitlines():
        number, controllers, path = line.split(":", 2)
        for name in found:
            if number == "0" and not controllers:
                found[name] += _upwards(root, path)
            elif name in controllers.split(","):
                found[name] += [root / name, *_upwards(root / name, path)]
    return found


def _upwards(root: Path, path: str) -> list[Path]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [root.joinpath(*parts[:depth]) for depth in range(len(parts), 0, -1)]


def _tightest(folders: list[Path], read: Callable[[Path], int | None]) -> int | None:
    values = [value for folder in folders if (value := read(folder)) is not None]
    return min(values, default=None)


def _memory_limit(folder: Path) -> int | None:
    return _number_in(folder, _MEMORY_LIMITS)


def _free_memory(folder: Path) -> int | None:
    limit, used = _memory_limit(folder), _number_in(folder, _MEMORY_USED)
    if limit is None or used is None:
        return None
    stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    cache = max(sum(int(stat.get(name, 0)) for name in names) for names in _MEMORY_CACHE)
    return max(0, limit - max(0, used - cache))


def _cpu_share(folder: Path) -> float | None:
    """CPUs that a folder allows: `quota period` in v2, one file each in v1; None: all."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period):
        return int(quota) / int(period)
    return None


def _number_in(folder: Path, names: Iterable[str]) -> int | None:
    """Read the first of these files that exists; None if it says "unlimited"."""
    for name in names:
        text = _read(folder / name)
        if text.isdigit() and int(text) < UNLIMITED_BYTES:
            return int(text)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

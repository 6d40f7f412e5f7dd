"""The limits that a container or a systemd unit puts on this process, as cgroup files tell them."""

from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED_BYTES = 2**60
"""cgroup v1 writes "no limit" as a huge number."""

_V2 = {"memory": "memory.max", "pids": "pids.max", "cpu": "cpu.max"}
_V1 = {"memory": "memory.limit_in_bytes", "pids": "pids.max"}


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
    """The limits of this process, from cgroup v2 or v1; what cannot be read counts as no limit."""
    folders = _folders(root, membership.read_text() if membership.exists() else "")
    memory = _tightest(folders["memory"], (_V2["memory"], _V1["memory"]))
    num_tasks = _tightest(folders["pids"], (_V2["pids"],))
    shares = [share for folder in folders["cpu"] if (share := _cpu_share(folder)) is not None]
    return Limits(
        memory_bytes=memory,
        num_tasks=num_tasks,
        num_cpus=min(shares, default=None),
    )


def _folders(root: Path, membership: str) -> dict[str, list[Path]]:
    """For each controller, this process's folder and all above it."""
    found: dict[str, list[Path]] = {name: [root] for name in ("memory", "pids", "cpu")}
    for line in membership.splitlines():
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


def _tightest(folders: list[Path], names: tuple[str, ...]) -> int | None:
    limits = [
        int(text)
        for folder in folders
        for name in names
        if (text := _read(folder / name)).isdigit() and int(text) < UNLIMITED_BYTES
    ]
    return min(limits, default=None)


def _cpu_share(folder: Path) -> float | None:
    """CPUs that a folder allows: `quota period` in v2, one file each in v1; None: all."""
    quota, _, period = _read(folder / _V2["cpu"]).partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period):
        return int(quota) / int(period)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

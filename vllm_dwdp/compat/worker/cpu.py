"""The CPU build of vLLM: which cores a rank runs on, and how much memory it counts as its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from vllm_dwdp.device.limits import proportional_set_bytes

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


@contextmanager
def bound_cores(parallel_config: Any, slot: int, num_slots: int) -> Iterator[list[int] | None]:
    """Bind the worker that is started meanwhile to its share of the host's cores.

    What the user put into `VLLM_CPU_OMP_THREADS_BIND` is left to vLLM; then None is yielded.
    """
    if os.environ.get(BIND_ENV, "auto") != "auto":
        yield None
        return
    cores = split_cores(slot, num_slots)
    before = os.environ.get(BIND_ENV), parallel_config.data_parallel_rank_local
    os.environ[BIND_ENV] = ",".join(map(str, cores))
    parallel_config.data_parallel_rank_local = None
    try:
        yield cores
    finally:
        parallel_config.data_parallel_rank_local = before[1]
        if before[0] is None:
            del os.environ[BIND_ENV]
        else:
            os.environ[BIND_ENV] = before[0]


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

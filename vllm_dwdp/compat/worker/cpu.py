"""The CPU build of vLLM: which cores a rank runs on, and how much memory it counts as its own."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vllm_dwdp.compat.worker.attributes import replaced
from vllm_dwdp.device.limits import proportional_set_bytes
from vllm_dwdp.device.openmp import pin_team
from vllm_dwdp.distributed.launch import BIND_ENV
from vllm_dwdp.errors import DwdpConfigError


def split_cores(slot: int, num_slots: int) -> list[int]:
    """Logical CPUs for rank `slot` of `num_slots` that share this process's: one per physical core.

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
def bound_cores(parallel_config: Any, slots: Sequence[int], num_slots: int) -> Iterator[None]:
    """While active, vLLM binds the workers that it starts to their shares of the cores of this process.

    What the user put into `VLLM_CPU_OMP_THREADS_BIND` is left to vLLM. The devices that vLLM gave the
    rank are hidden, because 0.33 takes them for memory nodes: the node is that of the cores.
    """
    before = os.environ.get(BIND_ENV)
    if before not in (None, "auto"):
        with replaced(parallel_config, assigned_physical_gpu_ids=None):
            yield
        return
    shares = [split_cores(slot, num_slots) for slot in slots]
    os.environ[BIND_ENV] = "|".join(",".join(map(str, cores)) for cores in shares)
    try:
        with replaced(
            parallel_config, assigned_physical_gpu_ids=None, data_parallel_rank_local=None
        ):
            yield
    finally:
        if before is None:
            del os.environ[BIND_ENV]
        else:
            os.environ[BIND_ENV] = before


def cores_of_workers(vllm_config: Any) -> list[list[int]]:
    """Return the cores that vLLM gives each worker of an engine; none at all if it shall bind nothing.

    Call while `bound_cores` is active.
    """
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    manager = OMPProcessManager(vllm_config)
    return [list(cores) for cores in manager.cpu_lists]


def confine_this_thread(cores: Sequence[int]) -> None:
    """Keep this thread, and every one that it will start, on `cores`.

    Call before vLLM makes its worker, which takes its memory from the node of the first core that it may
    use.

    Raises:
        DwdpConfigError: the user named cores that this process may not use.
    """
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise DwdpConfigError(
            f"{BIND_ENV}={os.environ[BIND_ENV]!r} gives this rank the cores {cores}, and its process "
            f"may use none but {sorted(os.sched_getaffinity(0))}. Name some of those, or leave it out."
        ) from error


@contextmanager
def confined_workers() -> Iterator[None]:
    """While active, each worker process that vLLM starts inherits the cores that vLLM gives it.

    vLLM tells them to its OpenMP runtime only, which has the worker's first thread on its first core.

    Raises:
        DwdpConfigError: as `confine_this_thread`.
    """
    from vllm.utils.ompmultiprocessing import OMPProcessManager
    from vllm.v1.executor import multiproc_executor

    class ConfiningManager(OMPProcessManager):
        @contextmanager
        def configure_omp_envs(self, rank: int, local_rank: int) -> Iterator[None]:
            own = confined_thread(self.cpu_lists[local_rank])
            with super().configure_omp_envs(rank, local_rank), own:
                yield

    with replaced(multiproc_executor, OMPProcessManager=ConfiningManager):
        yield


@contextmanager
def confined_thread(cores: Sequence[int]) -> Iterator[None]:
    """While active, this thread and what it starts stay on `cores`.

    Raises:
        DwdpConfigError: as `confine_this_thread`.
    """
    before = os.sched_getaffinity(0)
    confine_this_thread(cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def compute_on(cores: Sequence[int]) -> None:
    """Let torch compute with one thread on each of `cores`, for the calling thread.

    Call before vLLM makes its worker, after which the number of threads cannot be set.
    """
    if torch.get_num_threads() != len(cores):
        torch.set_num_threads(len(cores))
    pin_team(cores)


@contextmanager
def proportional_memory(num_workers: int) -> Iterator[None]:
    """While active, vLLM's CPU worker sizes the KV cache by proportional, not resident, memory.

    Composite tensors alias memory (a peer's pages, a slot seen from every layer); the resident
    set size counts every alias, so vLLM would leave room for memory that does not exist. Of several
    workers each counts its part of the engine's process too, their parent: by default all ranks divide
    the host's memory, and KV caches that leave no room for engines end in the kernel's OOM killer.
    """
    from vllm.v1.worker import cpu_worker

    stock = cpu_worker.psutil
    cpu_worker.psutil = SimpleNamespace(Process=partial(_ProportionalProcess, num_workers))
    try:
        yield
    finally:
        cpu_worker.psutil = stock


class _ProportionalProcess:
    def __init__(self, num_workers: int, pid: int) -> None:
        self._pid = pid
        self._num_workers = num_workers

    def memory_info(self) -> SimpleNamespace:
        own = proportional_set_bytes(self._pid)
        if self._num_workers > 1:
            own += proportional_set_bytes(os.getppid()) // self._num_workers
        return SimpleNamespace(rss=own)


MESSAGE_SEGMENT = re.compile(r"/dev/shm/\S*cpushm\S*")


def forget_names_of_messages() -> None:
    """Remove the names of the segments through which the workers of this rank exchange tensors.

    vLLM leaves that to the last destructors of a worker's process, which run neither where it is killed
    nor where it was forked. Call once the workers have met: all have mapped them then. The memory lives
    as long as the last mapping.
    """
    mapped = Path("/proc/self/maps").read_text()
    for place in sorted(set(MESSAGE_SEGMENT.findall(mapped))):
        Path(place).unlink(missing_ok=True)


ZENDNN_CACHE_ENV = "ZENDNNL_MATMUL_WEIGHT_CACHE"


def keep_weights_as_they_are() -> None:
    """Tell zentorch's kernels, which vLLM takes where it is installed, to read experts where they lie.

    By default ZenDNN packs a weight in place when it is first used, which a peer's memory does not
    allow, or keeps a packed copy by its address, which in a slot is that of several layers.

    Raises:
        DwdpConfigError: the user asked for either.
    """
    chosen = os.environ.setdefault(ZENDNN_CACHE_ENV, "0")
    if chosen != "0":
        raise DwdpConfigError(
            f"{ZENDNN_CACHE_ENV}={chosen!r} lets zentorch pack experts in place or cache them by "
            "address, which ranks that share them cannot allow. Leave it out, or set it to 0; or use "
            'dwdp mode "replica".'
        )

"""Which cores a rank runs on. Threads have an affinity of their own, so each test runs in one."""

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_dwdp.compat.worker import cpu
from vllm_dwdp.errors import DwdpConfigError

ALLOWED = sorted(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(cpu.BIND_ENV, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def config_of(**parallel: Any) -> Any:
    """As much of vLLM's config as its parser of core lists reads."""
    facts = {
        "local_world_size": 1,
        "data_parallel_rank_local": 1,
        "assigned_physical_gpu_ids": [1],
        "_api_process_count": 1,
    }
    parallel_config = SimpleNamespace(**(facts | parallel))
    return SimpleNamespace(parallel_config=parallel_config, kv_transfer_config=None)


def bind(config: Any, slot: int, num_slots: int) -> tuple[set[int], set[int], int]:
    """Return the cores of a thread that binds itself, of one that it starts, and its OpenMP threads."""
    with cpu.bound_cores(config.parallel_config, [slot], num_slots):
        for cores in cpu.cores_of_workers(config):
            cpu.confine_this_thread(cores)
            cpu.compute_on(cores)
    return os.sched_getaffinity(0), inherited(), torch.get_num_threads()


def inherited() -> set[int]:
    """Return the cores of a thread that this one starts."""
    found: list[set[int]] = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    return found[0]


def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def test_a_rank_and_what_it_starts_stay_on_its_share_of_the_cores() -> None:
    slots = [in_thread(bind, config_of(), slot, 2) for slot in (0, 1)]
    for slot, (own, inherited, num_threads) in enumerate(slots):
        assert own == inherited == set(cpu.split_cores(slot, 2))
        assert num_threads == len(own)


@pytest.mark.skipif(len(ALLOWED) < 2, reason="one core")
def test_the_users_cores_are_those_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.BIND_ENV, f"{ALLOWED[0]}|{ALLOWED[1]}")
    assert in_thread(bind, config_of(), 0, 2) == ({ALLOWED[1]}, {ALLOWED[1]}, 1)


def test_a_user_who_wants_no_binding_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.BIND_ENV, "nobind")
    before = torch.get_num_threads()
    assert in_thread(bind, config_of(), 0, 2) == (set(ALLOWED), set(ALLOWED), before)


def test_cores_that_the_process_may_not_use_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.BIND_ENV, "1000-1001")
    with pytest.raises(
        DwdpConfigError, match=r"='1000-1001' gives this rank the cores \[1000, 1001"
    ):
        in_thread(bind, config_of(data_parallel_rank_local=None), 0, 1)


@pytest.mark.parametrize("binding", [None, "nobind"])
def test_devices_are_no_memory_nodes_while_a_worker_starts(
    monkeypatch: pytest.MonkeyPatch, binding: str | None
) -> None:
    if binding is not None:
        monkeypatch.setenv(cpu.BIND_ENV, binding)
    parallel = config_of().parallel_config
    with cpu.bound_cores(parallel, [1], 2):
        assert parallel.assigned_physical_gpu_ids is None
    assert parallel.assigned_physical_gpu_ids == [1]
    assert parallel.data_parallel_rank_local == 1


def test_a_worker_process_is_started_on_the_ranks_cores() -> None:
    """It takes its memory from the node of the first core that it may use; the engine stays free."""

    def run() -> tuple[set[int], set[int]]:
        with cpu.confined_thread(ALLOWED[-1:]):
            started = inherited()
        return started, os.sched_getaffinity(0)

    assert in_thread(run) == ({ALLOWED[-1]}, set(ALLOWED))


class Machine:
    """A simulated topology: what vLLM reads of one, and which CPUs this process may use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def has(self, num_nodes: int, cores_per_node: int, siblings: int, allowed: set[int]) -> None:
        """Siblings of a core are numbered after all cores, as on real machines."""
        from vllm.utils import cpu_resource_utils

        num_cores = num_nodes * cores_per_node
        cpus = [
            cpu_resource_utils.LogicalCPUInfo(
                id=core + sibling * num_cores, physical_core=core, numa_node=core // cores_per_node
            )
            for sibling in range(siblings)
            for core in range(num_cores)
        ]
        self._patch.setattr(cpu_resource_utils, "_get_cpu_list", lambda: cpus)
        self._patch.setattr(os, "sched_getaffinity", lambda pid: allowed)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("topology", "allowed", "num_slots", "expected"),
    [
        ((1, 8, 1), range(8), 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ((1, 8, 1), range(2, 5), 1, [[2, 3, 4]]),
        ((2, 4, 2), range(16), 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),  # a node each, no siblings
        ((2, 4, 2), range(16), 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ((2, 4, 2), [4, 12, 5, 13], 1, [[4, 5]]),  # a container of two cores of the second node
        ((2, 4, 2), [12, 13], 1, [[12, 13]]),  # siblings only
        ((2, 3, 1), range(6), 4, [[0, 1], [2, 3], [4], [5]]),
        ((1, 2, 1), range(2), 3, [[0], [1], [0]]),  # fewer cores than ranks
    ],
)
def test_ranks_divide_physical_cores_node_by_node(
    machine: Machine,
    topology: tuple[int, int, int],
    allowed: Any,
    num_slots: int,
    expected: list[list[int]],
) -> None:
    machine.has(*topology, allowed=set(allowed))
    assert [cpu.split_cores(slot, num_slots) for slot in range(num_slots)] == expected


def test_zentorch_reads_shared_experts_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """What that does is shown by `tests/e2e/test_zentorch.py`, where it is installed."""
    monkeypatch.delenv(cpu.ZENDNN_CACHE_ENV, raising=False)
    cpu.keep_weights_as_they_are()
    assert os.environ[cpu.ZENDNN_CACHE_ENV] == "0"
    cpu.keep_weights_as_they_are()
    monkeypatch.setenv(cpu.ZENDNN_CACHE_ENV, "1")
    with pytest.raises(
        DwdpConfigError, match=r"WEIGHT_CACHE='1' lets zentorch pack experts in place"
    ):
        cpu.keep_weights_as_they_are()


def test_segments_that_are_mapped_lose_their_names_and_others_keep_theirs() -> None:
    segments = [Path(f"/dev/shm/dwdp_test_{os.getpid()}_{name}-cpushm_0") for name in "abc"]
    mapped, forgotten, of_another = segments
    try:
        for segment in segments:
            segment.write_bytes(b"tensor")
        with mapped.open("r+b") as first, forgotten.open("r+b") as second:
            kept = [mmap.mmap(file.fileno(), 6) for file in (first, second)]
        forgotten.unlink()  # as a peer does
        cpu.forget_names_of_messages()
        assert not mapped.exists() and of_another.exists()
        assert [each[:] for each in kept] == [b"tensor"] * 2
        cpu.forget_names_of_messages()
    finally:
        for segment in segments:
            segment.unlink(missing_ok=True)

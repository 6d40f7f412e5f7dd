"""Where a rank's threads run, from the process that starts it to a step: real affinities, no engine.

Affinities belong to threads, so each test runs in one; the machine has more CPUs than this process.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_dwdp.compat.frontend.ranks import find_ranks
from vllm_dwdp.compat.worker import cpu, independent
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.device import limits
from vllm_dwdp.distributed.launch import SHARED_CORES_ENV, DwdpLaunch, Seat
from vllm_dwdp.distributed.meeting import make_abstract_endpoint
from vllm_dwdp.executor.executor import DwdpExecutor, DwdpMultiprocExecutor

ALLOWED = set(sorted(os.sched_getaffinity(0))[:2])
NUM_RANKS = 4

pytestmark = pytest.mark.skipif(len(ALLOWED) < 2, reason="one core")


@pytest.fixture(autouse=True)
def a_larger_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    (tmp_path / "online").write_text("0-63\n")
    monkeypatch.setattr(limits, "ONLINE_CPUS", tmp_path / "online")
    monkeypatch.delenv(SHARED_CORES_ENV, raising=False)
    monkeypatch.delenv(cpu.BIND_ENV, raising=False)
    monkeypatch.setattr(independent, "restore_model_config", lambda config: None)
    monkeypatch.setattr(independent, "match_front_end_cache", lambda config: None)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def seat_of_server(rank: int, num_workers: int = 1) -> Seat:
    """Return the seat of a rank that is a server of its own, as its front end finds it here."""
    facts = {"data_parallel_size": NUM_RANKS, "data_parallel_size_local": 1}
    parallel = SimpleNamespace(**facts, data_parallel_rank=rank, data_parallel_backend="mp")
    args = SimpleNamespace(data_parallel_size=NUM_RANKS)
    span = find_ranks(
        args, SimpleNamespace(parallel_config=parallel), NUM_RANKS, headless=False
    ).span
    config = DwdpConfig(group_size=NUM_RANKS)
    launch = DwdpLaunch(
        config=config,
        ranks=span,
        endpoint=make_abstract_endpoint(),
        tensor_parallel_size=num_workers,
    )
    return launch.seat(rank)


def make(executor_class: Any, seat: Seat) -> Any:
    executor = executor_class.__new__(executor_class)
    facts = {
        "local_world_size": seat.launch.tensor_parallel_size,
        "data_parallel_rank_local": 0,
        "_api_process_count": 1,
    }
    executor.parallel_config = SimpleNamespace(**facts, assigned_physical_gpu_ids=None)
    executor.vllm_config = SimpleNamespace(
        parallel_config=executor.parallel_config,
        model_config=SimpleNamespace(trust_remote_code=False),
        kv_transfer_config=None,
        seat=seat,
    )
    return executor


def in_confined_thread(function: Callable[[], Any]) -> Any:
    def run() -> Any:
        os.sched_setaffinity(0, ALLOWED)
        return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def inherited() -> set[int]:
    found: list[set[int]] = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_with_a_cpuset_of_its_own_computes_on_all_of_it(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    seen: list[set[int]] = []

    def step(self: Any, *args: Any) -> str:
        seen.append(os.sched_getaffinity(0))
        return f"did {args}"

    monkeypatch.setattr(UniProcExecutor, "execute_model", step)
    monkeypatch.setattr(independent, "seat_of", lambda config: config.seat)

    def run() -> tuple[Any, ...]:
        executor = make(DwdpExecutor, seat_of_server(rank))
        with executor.starting():
            during = os.sched_getaffinity(0), torch.get_num_threads()
        done = executor.execute_model("step")
        return *during, done, os.sched_getaffinity(0), inherited()

    during, num_threads, done, after, of_new_threads = in_confined_thread(run)
    assert (during, num_threads) == (ALLOWED, 2)
    assert seen == [{min(ALLOWED)}] and done == "did ('step',)"
    assert after == of_new_threads == ALLOWED


def test_ranks_that_are_told_to_share_a_cpuset_divide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHARED_CORES_ENV, "1")
    monkeypatch.setattr(independent, "seat_of", lambda config: config.seat)

    def run(rank: int) -> set[int]:
        with make(DwdpExecutor, seat_of_server(rank)).starting():
            return os.sched_getaffinity(0)

    found = [in_confined_thread(lambda rank=rank: run(rank)) for rank in range(NUM_RANKS)]
    first, second = ({core} for core in sorted(ALLOWED))
    assert found == [first, second, first, second], "more ranks than cores"


@pytest.mark.parametrize(
    ("num_workers", "share", "expected"),
    [
        (1, True, [{max(ALLOWED)}]),
        (2, False, [{min(ALLOWED)}, {max(ALLOWED)}]),
        (
            2,
            True,
            [{min(ALLOWED)}, {max(ALLOWED)}],
        ),  # four ranks of two: the third and fourth of eight
    ],
)
def test_each_worker_process_inherits_its_own_cores_and_the_engine_stays_free(
    monkeypatch: pytest.MonkeyPatch, num_workers: int, share: bool, expected: list[set[int]]
) -> None:
    """vLLM takes a worker's memory from the node of the first core that it may use."""
    from vllm.v1.executor import multiproc_executor

    if share:
        monkeypatch.setenv(SHARED_CORES_ENV, "1")
    monkeypatch.setattr(independent, "seat_of", lambda config: config.seat)

    def run() -> tuple[list[set[int]], list[str], set[int]]:
        executor = make(DwdpMultiprocExecutor, seat_of_server(1, num_workers))
        found, threads = [], []
        with executor.starting():
            manager = multiproc_executor.OMPProcessManager(executor.vllm_config)
            for rank in range(num_workers):
                with manager.configure_omp_envs(rank=rank, local_rank=rank):
                    found.append(inherited())
                    threads.append(os.environ["OMP_NUM_THREADS"])
        assert multiproc_executor.OMPProcessManager is not type(manager)
        return found, threads, os.sched_getaffinity(0)

    assert in_confined_thread(run) == (expected, ["1"] * num_workers, ALLOWED)


def test_nothing_is_bound_where_the_user_wants_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.BIND_ENV, "nobind")
    monkeypatch.setattr(independent, "seat_of", lambda config: config.seat)
    monkeypatch.setattr(UniProcExecutor, "execute_model", lambda self: os.sched_getaffinity(0))

    def run() -> Any:
        executor = make(DwdpExecutor, seat_of_server(1))
        with executor.starting():
            during = os.sched_getaffinity(0)
        return during, executor.execute_model()

    assert in_confined_thread(run) == (ALLOWED, ALLOWED)

    def run_workers() -> list[set[int]]:
        from vllm.v1.executor import multiproc_executor

        executor = make(DwdpMultiprocExecutor, seat_of_server(1, 2))
        with executor.starting():
            manager = multiproc_executor.OMPProcessManager(executor.vllm_config)
            with manager.configure_omp_envs(rank=1, local_rank=1):
                return [inherited()]

    assert in_confined_thread(run_workers) == [ALLOWED]

"""Which cores a rank runs on. Threads have an affinity of their own, so each test runs in one."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
    """The cores of the thread that binds itself and of one that it starts, and its OpenMP threads."""
    with cpu.bound_cores(config.parallel_config, slot, num_slots):
        cpu.bind_this_process(config)
    inherited: list[set[int]] = []
    thread = threading.Thread(target=lambda: inherited.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    return os.sched_getaffinity(0), inherited[0], torch.get_num_threads()


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
    with cpu.bound_cores(parallel, 1, 2):
        assert parallel.assigned_physical_gpu_ids is None
    assert parallel.assigned_physical_gpu_ids == [1]
    assert parallel.data_parallel_rank_local == 1

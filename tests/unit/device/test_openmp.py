"""Threads that compute stay on their cores. Each test runs in a thread, which has a team of its own."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_dwdp.device import openmp

ALLOWED = sorted(os.sched_getaffinity(0))

pytestmark = pytest.mark.skipif(len(ALLOWED) < 2, reason="one core")


def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def look_at_team(size: int) -> dict[int, tuple[int, set[int]]]:
    """Return the id and the cores of each thread that computes for the calling one."""
    runtime = ctypes.CDLL(None)
    found: dict[int, tuple[int, set[int]]] = {}

    def look(_: object) -> None:
        thread = threading.get_native_id()
        found[runtime.omp_get_thread_num()] = (thread, os.sched_getaffinity(0))

    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(look)
    runtime.GOMP_parallel(body, None, ctypes.c_uint(size), ctypes.c_uint(0))
    return found


def test_each_thread_that_torch_computes_with_is_on_its_core() -> None:
    def run() -> tuple[Any, Any]:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            openmp.pin_team(ALLOWED[1::-1])
            pinned = look_at_team(2)
            compute()
            return pinned, look_at_team(2)
        finally:
            torch.set_num_threads(before)

    pinned, after = in_thread(run)
    assert pinned[0][1] == set(ALLOWED), "the thread that asks stays free: others inherit from it"
    assert pinned[1][1] == {ALLOWED[0]}
    assert after == pinned, "torch computes with the same threads, whatever it computes"


def compute() -> None:
    """Kernels of several libraries and sizes, large and too small for the team."""
    torch.randn(2000, 2000).exp().sum()
    torch.softmax(torch.randn(64, 1000), -1).sort()
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(512, 512, dtype=dtype)
        for rows in (1, 3, 64):
            torch.nn.functional.linear(torch.randn(rows, 512, dtype=dtype), weight)
    torch.randn(3, 7) @ torch.randn(7, 3)


def test_a_rank_of_one_core_needs_no_team(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp.ctypes, "CDLL", lambda name: pytest.fail("asked for the runtime"))
    openmp.pin_team(ALLOWED[:1])


def test_another_runtime_computes_unpinned_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(openmp.ctypes, "CDLL", lambda name: SimpleNamespace())
    monkeypatch.setattr(openmp.logger, "warning", lambda text, error: said.append(text % error))
    openmp.pin_team(ALLOWED[:2])
    assert len(said) == 1 and "cannot pin" in said[0] and "GOMP_parallel" in said[0]


def test_a_thread_is_on_one_core_while_it_computes_and_free_again() -> None:
    def run() -> list[set[int]]:
        seen = [os.sched_getaffinity(0)]
        with contextlib.suppress(KeyError), openmp.on_core(ALLOWED[1]):
            seen.append(os.sched_getaffinity(0))
            raise KeyError
        return [*seen, os.sched_getaffinity(0)]

    assert in_thread(run) == [set(ALLOWED), {ALLOWED[1]}, set(ALLOWED)]

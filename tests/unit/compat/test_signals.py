"""What SIGINT and SIGTERM do while a rank starts."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest

from vllm_dwdp.compat.worker.signals import (
    SIGNALS,
    EndedBySignal,
    end_with_engine,
    ended_by_signals,
    records_signals_only,
    vllm_watches_engine,
)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers as in vLLM's engine process, which only note a signal."""
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_ends_the_start_and_no_other_disturbs_the_undoing(
    number: signal.Signals,
) -> None:
    recorded = signal.getsignal(number)
    undone = []

    def undo() -> None:
        for later in SIGNALS:
            os.kill(os.getpid(), later)
        undone.append(True)

    def start() -> None:
        with ended_by_signals(), ExitStack() as resources:
            resources.callback(undo)
            os.kill(os.getpid(), number)
            pytest.fail("went on")

    with pytest.raises(EndedBySignal, match=f"^{number.name} while it started$") as ended:
        start()
    assert ended.value.code == 128 + number
    assert undone
    assert signal.getsignal(number) is recorded


def test_a_thread_leaves_signals_alone() -> None:
    seen = []

    def start() -> None:
        with ended_by_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    recorded = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert seen == [recorded]


def test_an_engine_process_is_told_from_the_process_of_a_user() -> None:
    assert records_signals_only()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert not records_signals_only()


FORK = multiprocessing.get_context("fork")


def worker(watched_by_vllm: bool, told: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_engine()
    if watched_by_vllm:
        vllm_watches_engine()
    told.send(os.getpid())
    time.sleep(60)


def engine(watched_by_vllm: bool, told: Any) -> None:
    end_with_engine()  # it is no worker
    FORK.Process(target=worker, args=(watched_by_vllm, told), daemon=True).start()
    time.sleep(60)


@pytest.mark.parametrize("watched_by_vllm", [False, True])
def test_a_worker_that_starts_ends_with_its_engine(watched_by_vllm: bool) -> None:
    """It may wait minutes for its peers, and would keep its place among them."""
    hears, told = FORK.Pipe(duplex=False)
    process = FORK.Process(target=engine, args=(watched_by_vllm, told))
    process.start()
    started = psutil.Process(hears.recv())
    process.kill()
    process.join()
    gone, alive = psutil.wait_procs([started], timeout=1 if watched_by_vllm else 20)
    for each in alive:
        each.kill()
    assert bool(alive) == watched_by_vllm and len(gone) + len(alive) == 1

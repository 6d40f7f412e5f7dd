"""What SIGINT and SIGTERM do while a rank starts."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from vllm_dwdp.compat.worker.signals import (
    SIGNALS,
    EndedBySignal,
    ended_by_signals,
    records_signals_only,
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

"""SIGINT and SIGTERM while a rank starts: vLLM defers them, and a DWDP rank may wait minutes for a peer.

Used in the front end, which waits for its engines, in the engine process, which waits for its peers or
its workers, and in worker processes, which wait for their peers.
"""

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class EndedBySignal(SystemExit):
    """Ends the process as a signal would; no handler swallows it, and peers are told its text."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self._name = signal.Signals(number).name

    def __str__(self) -> str:
        return f"{self._name} while it started"


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While active, the first SIGINT or SIGTERM raises `EndedBySignal`.

    Later ones are ignored, so that nothing interrupts what is undone meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise EndedBySignal(signum)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def records_signals_only() -> bool:
    """Whether SIGTERM calls a handler, as in vLLM's engine process, where it only notes the request.

    An engine in the process of its user leaves that process's signals alone: there SIGTERM ends it, and
    SIGINT raises KeyboardInterrupt.
    """
    return callable(signal.getsignal(signal.SIGTERM))


def end_with_engine() -> None:
    """Let a worker process end when its engine does, also by SIGKILL, until `vllm_watches_engine`.

    Call in the worker's main thread. vLLM's own watch begins once a worker has loaded its model.
    """
    engine = _engine()
    if engine is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
    if os.getppid() != engine.pid:  # it had ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)


def vllm_watches_engine() -> None:
    """Undo `end_with_engine`: the kernel means the thread of the engine, which may end before it."""
    if _engine() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(0))


def _engine() -> Any:
    """Return the engine's process, of a worker in one of its own; None where both are one."""
    is_worker = multiprocessing.current_process().daemon
    return multiprocessing.parent_process() if is_worker else None

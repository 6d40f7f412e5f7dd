"""SIGINT and SIGTERM while a rank starts: vLLM defers them, and a DWDP rank may wait minutes for a peer.

Used in the front end, which waits for its engines, and in the engine process, which waits for its peers.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class EndedBySignal(SystemExit):
    """Ends the process as a signal would; nobody swallows it, and peers are told its text."""

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

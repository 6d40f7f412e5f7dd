"""SIGINT and SIGTERM while engines start: vLLM's front end must end, not wait on.

Stock vLLM swallows the interrupt in its handshake context (`zmq_socket_ctx`) or, under asyncio,
defers it until the loop runs again, and then waits for engines that ignore SIGTERM while they are
built. Stock engines are up soon after; a DWDP rank may be waiting minutes for a peer.
"""

import functools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def install() -> None:
    """From now on, this front end ends at once when it is interrupted while engines start."""
    from vllm.v1.engine import utils

    stock = getattr(utils.wait_for_engine_startup, "dwdp_stock", utils.wait_for_engine_startup)

    @functools.wraps(stock)
    def wait_for_engine_startup(*args: Any, **kwargs: Any) -> Any:
        with _ended_by_signals():
            return stock(*args, **kwargs)

    wait_for_engine_startup.dwdp_stock = stock  # type: ignore[attr-defined]
    utils.wait_for_engine_startup = wait_for_engine_startup


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """While active, SIGINT and SIGTERM raise SystemExit, which nobody swallows."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

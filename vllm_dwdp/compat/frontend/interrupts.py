"""Ctrl-C at an offline `LLM` is for the process that owns it: its engines never get the signal.

A terminal sends SIGINT to the whole process group, and vLLM's engines end on it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from typing import Any

from vllm.v1.engine import core_client


@contextmanager
def engines_without_interrupts() -> Iterator[None]:
    """While active, engines are started with SIGINT blocked, which their workers inherit."""
    stock = core_client.launch_core_engines

    @contextmanager
    def launch_core_engines(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with ExitStack() as stack:
            with blocked_interrupts():
                launched = stack.enter_context(stock(*args, **kwargs))
            yield launched  # then vLLM waits for its engines, which Ctrl-C does end

    core_client.launch_core_engines = launch_core_engines
    try:
        yield
    finally:
        core_client.launch_core_engines = stock


@contextmanager
def blocked_interrupts() -> Iterator[None]:
    """Block SIGINT in this thread; it comes through afterwards."""
    resource_tracker.ensure_running()  # when it is started, it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep Ctrl-C waiting until the end, so that a message is sent whole."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda signum, frame: held.append(signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)

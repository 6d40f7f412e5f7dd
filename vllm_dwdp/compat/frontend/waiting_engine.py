"""An engine process that is forked early, while its front end has imported vLLM and has one thread.

It waits for what vLLM sends a process that it spawns, and becomes that process: the same pickled
object, environment and descriptors, without a new interpreter that imports everything again. It is a
child of the front end, in its session, and ends with it if it is never needed.

`prepare` runs in a front end before vLLM does; `in_place` when that starts its engine.
"""

import functools
import io
import multiprocessing
import os
import pickle
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import context, popen_spawn_posix, resource_tracker, spawn, util
from multiprocessing.process import BaseProcess
from typing import Any

from vllm_dwdp.compat.frontend.loading import read_differently
from vllm_dwdp.compat.worker.attributes import replaced
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)

_LENGTH = struct.Struct("Q")

_waiting: "WaitingEngine | None" = None
"""The one of this process, until it is used."""


class WaitingEngine:
    """A forked child that waits to become a process; the parent's side.

    Args:
        pid: of the child.
        sentinel: readable once it has ended.
        channel: where its work is written; it ends when this is closed unused.
        loaded_with: the environment that its libraries were loaded with.
    """

    def __init__(
        self, pid: int, sentinel: int, channel: int, loaded_with: Mapping[str, str]
    ) -> None:
        self.pid = pid
        self.sentinel = sentinel
        self.channel = channel
        self.loaded_with = loaded_with

    def close(self) -> None:
        """Close our descriptors; it ends if it has got no work."""
        os.close(self.channel)
        os.close(self.sentinel)

    def dismiss(self) -> None:
        """Let it end unused."""
        self.close()
        os.waitpid(self.pid, 0)


def prepare(loaded_with: Mapping[str, str]) -> None:
    """Fork the engine process that this front end will need; call while it has one thread.

    Args:
        loaded_with: the environment that this process's libraries were loaded with.
    """
    global _waiting
    resource_tracker.ensure_running()  # shared with the child, as with one that is spawned
    work, channel = os.pipe()
    sentinel, held_open = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(channel)
        os.close(sentinel)
        sys.exit(_become(work))
    os.close(work)
    os.close(held_open)
    _waiting = WaitingEngine(pid, sentinel, channel, loaded_with)


def _become(work: int) -> int:
    """Wait for work, and do it as a process that multiprocessing has spawned; its exit code."""
    head = os.read(work, _LENGTH.size)
    if not head:
        os._exit(0)  # never needed: nothing of it is to be torn down
    length, content = _LENGTH.unpack(head)[0], b""
    while len(content) < length:
        content += os.read(work, length - len(content))
    os.environ.clear()
    os.environ.update(pickle.loads(content))
    return int(spawn._main(work, os.dup(work)))


@contextmanager
def in_place(starting: Any) -> Iterator[None]:
    """While active, the one process that `starting` makes is the waiting engine, if there is one.

    Args:
        starting: vLLM's module that asks `get_mp_context` for the way to start a process.
    """
    global _waiting
    engine, _waiting = _waiting, None
    if engine is None:
        yield
        return
    if changed := read_differently(engine.loaded_with, os.environ):
        logger.info(
            "DWDP starts a new engine process, not the one that was forked early, because these "
            "variables have changed since: %s",
            ", ".join(changed),
        )
        engine.dismiss()
        yield
        return
    with replaced(starting, get_mp_context=lambda: _Context(engine)):
        yield


class _Context(context.SpawnContext):
    """Starts the first process in the waiting engine, and any other one as ever."""

    def __init__(self, engine: WaitingEngine) -> None:
        super().__init__()
        self._engine: WaitingEngine | None = engine

    def Process(self, *args: Any, **kwargs: Any) -> BaseProcess:  # type: ignore[override]
        """As multiprocessing's."""
        engine, self._engine = self._engine, None
        process = context.SpawnProcess(*args, **kwargs)
        if engine is not None:
            vars(process)["_Popen"] = functools.partial(_Popen, engine=engine)
        return process


class _Popen(popen_spawn_posix.Popen):
    """Hands a process to the waiting engine; descriptors beside it need an ordinary spawn."""

    def __init__(self, process_obj: BaseProcess, engine: WaitingEngine) -> None:
        self._engine = engine
        del vars(process_obj)["_Popen"]  # it is about to be pickled
        super().__init__(process_obj)

    def _launch(self, process_obj: BaseProcess) -> None:
        content = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            prepared = spawn.get_preparation_data(process_obj.name)
            multiprocessing.reduction.dump(prepared, content)
            multiprocessing.reduction.dump(process_obj, content)
        finally:
            context.set_spawning_popen(None)
        if self._fds:
            self._engine.dismiss()
            self._fds: list[int] = []
            super()._launch(process_obj)  # type: ignore[misc]
            return
        environment = pickle.dumps(dict(os.environ))
        self.pid, self.sentinel = self._engine.pid, self._engine.sentinel
        self.finalizer = util.Finalize(self, self._engine.close)
        with open(self._engine.channel, "wb", closefd=False) as channel:
            channel.write(_LENGTH.pack(len(environment)) + environment + content.getbuffer())

"""A process that has imported vLLM once and forks a child for every program it is asked to run.

Importing vLLM takes most of the time of a short engine process. The server imports it, checks that
it runs on one thread, freezes its heap and then forks: a child runs `python -m MODULE ARGUMENTS` or
`python -c CODE` in a session of its own, with the log, working directory and environment of its
request. Only what is read while vLLM, torch or a library is loaded comes from the server's
environment; `engines.py`, which starts this and speaks to it, has one server per such environment.

    python -m tests.helpers.fork_server FD

FD is one end of a SEQPACKET socket pair. A request is a JSON object with a socket attached; the
child's process id and later its exit code are written to that socket. When the other end of that
socket is closed the child is killed, and when FD's other end is closed the server ends with all of
its children.
"""

import array
import dataclasses
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

PRELOADED = (
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.attention.backends.mla.cpu_mla",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.models.deepseek_v2",
    "vllm.model_executor.models.gpt_oss",
    "vllm.model_executor.models.mixtral",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.renderers.hf",
)
"""Modules of vLLM that a small engine needs. Plugins are not loaded: a child may choose them."""

MESSAGE_BYTES = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A program to run in a fork of the server.

    Args:
        arguments: of the interpreter, `-m` or `-c` first.
        environment: all of it.
        log: file for its output, which is overwritten.
        folder: working directory.
    """

    arguments: list[str]
    environment: dict[str, str]
    log: str
    folder: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Child:
    """A forked program; its exit code is owed to `asker`."""

    pid: int
    pidfd: int
    asker: socket.socket

    def kill(self) -> None:
        """Kill its whole session; it may have ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close this process's descriptors of it."""
        os.close(self.pidfd)
        self.asker.close()


class ForkServer:
    """Forks a child per request and tells how it ended; runs on the process's only thread."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: set[Child] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)

    def run(self) -> Request | None:
        """Serve; return the request in a forked child, and None in the server when it is over."""
        while True:
            for key, _ in self._selector.select():
                if isinstance(key.data, Child):
                    self._hear(key.data, ended=key.fd == key.data.pidfd)
                    break  # both descriptors of a child may be ready, and are closed now
                received = receive(self._control)
                if received is None:
                    self._end()
                    return None
                if self._fork(*received):
                    return received[0]

    def _fork(self, request: Request, asker: socket.socket) -> bool:
        """Fork; return whether this is the child."""
        assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()  # before anybody may kill the session by our process id
            os.close(ready)
            os.close(told)
            asker.close()
            for child in self._children:
                child.close()
            self._selector.close()
            self._control.close()
            return True
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        child = Child(pid=pid, pidfd=os.pidfd_open(pid), asker=asker)
        self._children.add(child)
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        self._selector.register(asker, selectors.EVENT_READ, child)
        with suppress(OSError):
            asker.send(json.dumps(pid).encode())
        return False

    def _hear(self, child: Child, ended: bool) -> None:
        if not ended:
            self._selector.unregister(child.asker)
            child.kill()
            return
        code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        child.kill()  # what it left in its session
        with suppress(OSError):
            child.asker.send(json.dumps(code).encode())
        self._selector.unregister(child.pidfd)
        with suppress(KeyError):
            self._selector.unregister(child.asker)
        self._children.discard(child)
        child.close()

    def _end(self) -> None:
        for child in self._children:
            child.kill()
            os.waitpid(child.pid, 0)


def receive(control: socket.socket) -> tuple[Request, socket.socket] | None:
    """Return the next request and the socket to answer on; None if nobody can ask any more."""
    room = socket.CMSG_SPACE(array.array("i").itemsize)
    message, attached, _, _ = control.recvmsg(MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    if not message:
        return None
    (fd,) = array.array("i", attached[0][2])
    return Request(**json.loads(message)), socket.socket(fileno=fd)


def become(request: Request) -> None:
    """Turn a fresh fork into the process that the request describes, and run its program."""
    for number in (signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    keep_frozen()
    kind, program, *arguments = request.arguments
    sys.argv = [program, *arguments]
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        assert kind == "-c"
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


def keep_frozen() -> None:
    """Leave the imported modules out of garbage collection for good.

    vLLM freezes the heap when an engine has started and thaws all of it when one ends. Walking its
    modules takes 0.3 s, ten times per short engine. What the child itself makes is collected as ever.
    """

    def nothing() -> None:
        pass

    gc_module: Any = gc
    gc_module.freeze = gc_module.unfreeze = nothing


def main(fd: int) -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    request = ForkServer(socket.socket(fileno=fd)).run()
    if request is None:
        os._exit(0)  # libraries complain about a frozen heap at an ordinary exit
    become(request)


if __name__ == "__main__":
    main(int(sys.argv[1]))

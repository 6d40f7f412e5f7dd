"""A process that has imported vLLM once, and forks every rank of a launch: the process's own side.

It runs on one thread, touches no device and opens nothing but its log. A fork becomes `vllm serve` with
the arguments, environment, folder and log of its request, in a session of its own. It becomes a child of
the process that asked, which is its nearest living ancestor that adopts orphans: so its exit code, its
end with its parent and its signals are those of a process that was started there, and it may outlive
this one.

    python -m vllm_dwdp.entrypoints.launch.template FD

FD is one end of a SEQPACKET socket pair. First `{"ready": true}` or `{"refused": why}` is written to it.
Then a request is a JSON object with the log attached, and its answer, sent by the fork, the fork's
process id. The process ends when the other end is closed.
"""

import array
import contextlib
import dataclasses
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time

from vllm_dwdp.compat.frontend import loading
from vllm_dwdp.entrypoints.launch.process import ending_with

MESSAGE_BYTES = 2**20
ADOPTION_TIMEOUT_S = 10.0

OURS = (
    "vllm_dwdp.compat.frontend.engine_config",
    "vllm_dwdp.compat.frontend.offline",
    "vllm_dwdp.compat.frontend.waiting_engine",
    "vllm_dwdp.executor.cpu_worker",
    "vllm_dwdp.executor.executor",
)
"""Our own modules that a rank imports; none of them changes vLLM by that."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A `vllm serve` to become.

    Args:
        arguments: of the command, the program first.
        environment: all of it.
        folder: working directory.
        parent: process id of the process that asks.
    """

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    parent: int


def main(control: socket.socket) -> None:
    """Import vLLM, then fork until no process can ask any more; in a fork, run `vllm serve`."""
    before = dict(os.environ)
    refusal = load()
    loaded_with = dict(os.environ)
    control.send(json.dumps({"refused": refusal} if refusal else {"ready": True}).encode())
    while not refusal:
        received = receive(control)
        if received is None:
            break
        request, log = received
        if fork(request, log, control):
            become(request, before=before, loaded_with=loaded_with)
        os.close(log)
    os._exit(0)  # nothing to tear down; libraries complain about a frozen heap


def load() -> str:
    """Import everything that a rank will need; why it must not be forked, if so."""
    # First of all: it finds the arguments in memory beside the first environment only.
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").setproctitle("vllm-dwdp: imports vLLM for ranks")
    for name in (*loading.MODULES, *OURS):
        importlib.import_module(name)
    platform = importlib.import_module("vllm.platforms").current_platform
    if not platform.is_cpu():
        return f"forks of a process with vLLM for {platform.device_type} have not been tried"
    num_threads = len(os.listdir("/proc/self/task"))
    if num_threads > 1:
        return f"importing vLLM started {num_threads - 1} threads, which a fork would not have"
    gc.collect()
    gc.freeze()
    return ""


def receive(control: socket.socket) -> tuple[Request, int] | None:
    """Return the next request and its log; None if no process can ask any more."""
    room = socket.CMSG_SPACE(array.array("i").itemsize)
    message, attached, _, _ = control.recvmsg(MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    if not message:
        return None
    (log,) = array.array("i", attached[0][2])
    return Request(**json.loads(message)), log


def fork(request: Request, log: int, control: socket.socket) -> bool:
    """Fork a child of the process that asks; whether this is the child, which has told its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return False
    if os.fork():
        os._exit(0)
    os.setsid()
    deadline = time.monotonic() + ADOPTION_TIMEOUT_S
    while os.getppid() != request.parent:
        if time.monotonic() > deadline:
            os._exit(128 + signal.SIGTERM)
        time.sleep(0.001)
    ending_with(request.parent)()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    control.send(json.dumps(os.getpid()).encode())
    control.close()
    return True


def become(request: Request, *, before: dict[str, str], loaded_with: dict[str, str]) -> None:
    """Turn a fresh fork into the server that the request describes, and run it to its end.

    Args:
        before: the environment of this process before it imported vLLM.
        loaded_with: the same afterwards: vLLM changes some of it.
    """
    os.chdir(request.folder)
    given = request.environment
    changed = {
        name: value
        for name, value in loaded_with.items()
        if before.get(name) != value and before.get(name) == given.get(name)
    }
    os.environ.clear()
    os.environ.update(given | changed)
    time.tzset()
    importlib.import_module("numpy").random.seed()  # Python's own generator is seeded by the fork
    sys.argv = list(request.arguments)
    if title := sys.modules.get("setproctitle"):
        title.setproctitle(" ".join(request.arguments))
    from vllm.entrypoints.cli.main import main as serve

    from vllm_dwdp.compat.frontend import waiting_engine

    waiting_engine.prepare(loaded_with)
    sys.exit(serve())  # as the program does


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))

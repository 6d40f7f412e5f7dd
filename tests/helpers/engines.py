"""Engine processes for tests: forks of processes that have imported vLLM already.

`fork` stands where `subprocess.Popen([sys.executable, ...])` would. The servers that fork are started
when first needed and ended with the test session; see `fork_server.py`.
"""

import array
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from tests.helpers.fork_server import Request

ROOT = Path(__file__).parents[2]
ENGINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
"""The environment of an engine that runs in its process's only thread, on any core."""
READ_ON_LOADING = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "TRITON_INTERPRET", *ENGINE)
"""Variables that a child cannot change any more, because its server has loaded the libraries."""
NUM_SERVERS = 2
"""Neighbouring ranks are forks of different processes, so that neither addresses nor hashes agree."""
END_TIMEOUT_S = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fork:
    """A running fork; its session is killed by `kill` or when this process ends."""

    pid: int
    answers: socket.socket

    def wait(self, timeout: float) -> int:
        """Return its exit code, negative for a signal.

        Raises:
            TimeoutError: it has not ended.
        """
        self.answers.settimeout(timeout)
        answer = self.answers.recv(64)
        assert answer, "the fork server has ended"
        return int(json.loads(answer))

    def kill(self) -> None:
        """Return once nothing is left of it and its session."""
        with self.answers, suppress(OSError):
            self.answers.shutdown(socket.SHUT_WR)
            self.answers.settimeout(END_TIMEOUT_S)
            while self.answers.recv(64):
                pass


class _Server:
    """A fork server and the lock that makes its one control socket usable from threads."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.fork_server", str(theirs.fileno())],
                cwd=ROOT,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # an interrupt at the terminal is for the tests
            )

    def fork(self, request: Request) -> Fork:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            attached = array.array("i", [theirs.fileno()])
            message = json.dumps(dataclasses.asdict(request)).encode()
            self._control.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, attached)])
        pid = ours.recv(64)
        assert pid, f"the fork server ended with {self.process.wait(END_TIMEOUT_S)}"
        return Fork(pid=int(json.loads(pid)), answers=ours)

    def end(self) -> None:
        self._control.close()
        try:
            self.process.wait(END_TIMEOUT_S)
        finally:
            self.process.kill()
            self.process.wait()


_servers: dict[tuple[int, tuple[str | None, ...]], _Server] = {}
_starting = threading.Lock()


def fork(
    arguments: list[str],
    log: Path,
    environment: dict[str, str] | None = None,
    rank: int = 0,
) -> Fork:
    """Run `python ARGUMENTS`, which begin with `-m` or `-c`, in a fork of a process with vLLM.

    Args:
        log: for its output, from its beginning.
        environment: added to this process's and to `ENGINE`.
        rank: of the engine, if it is one of several.
    """
    everything = os.environ | ENGINE | (environment or {})
    key = rank % NUM_SERVERS, tuple(everything.get(name) for name in READ_ON_LOADING)
    with _starting:
        if key not in _servers:
            _servers[key] = _Server(everything)
    return _servers[key].fork(
        Request(arguments=arguments, environment=everything, log=str(log), folder=str(ROOT))
    )


def server_pids() -> set[int]:
    """Process ids of the servers, which live on between modules."""
    return {server.process.pid for server in _servers.values()}


def end_servers() -> None:
    """End the servers of this session."""
    while _servers:
        _servers.popitem()[1].end()

"""A real server as a child process: its log, plain HTTP, its metrics, its end.

Used by the tests, the benchmarks, the demo and `vllm-dwdp bench`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.process import is_tracker, start_process

VLLM = str(Path(sys.executable).with_name("vllm"))
SERVE = (VLLM, "serve")
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
READY_PATH = "/health"
"""200 when the engine serves; until then no process listens at the port."""
WAKE = ("sh", "-c", 'read -r nothing; kill -s CONT "$@"', "sh")
"""Wakes the processes that are named after it once no process can write to its input any more."""
_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


class ServerError(RuntimeError):
    """A server did not start; carries the end of its log."""


class Server:
    """One `vllm serve`, started at once; a context manager that stops it.

    Args:
        arguments: of `vllm serve`, the model first; host and port are added.
        log: file for its output.
        environment: added to ours.
        program: another server that takes a host and a port and answers at `READY_PATH` when it serves.
        port: to listen at; None takes a free one.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        environment: dict[str, str],
        program: Sequence[str] = SERVE,
        port: int | None = None,
    ) -> None:
        port = free_ports(1)[0] if port is None else port
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._waker: subprocess.Popen[bytes] | None = None
        self.command = [*program, *arguments, "--host", "127.0.0.1", "--port", str(port)]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self.process = start_process(self.command, output, _DEFAULTS | os.environ | environment)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def is_ready(self) -> bool:
        """Whether it answers.

        Raises:
            ServerError: it has ended.
        """
        if self.process.poll() is not None:
            raise ServerError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            self.get(READY_PATH)
            return True
        return False

    def wait_until_ready(self) -> None:
        """Return once it answers.

        Raises:
            ServerError: it ended, or took longer than `START_TIMEOUT_S`.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_ready():
            if time.monotonic() > deadline:
                raise ServerError(f"no answer within {START_TIMEOUT_S:.0f} s:\n{self.tail()}")
            time.sleep(0.25)

    def get(self, path: str) -> str:
        """Return the body of `GET path`."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return str(response.read().decode())

    def complete(self, rank: int | None = None, **body: Any) -> dict[str, Any]:
        """One greedy completion, on rank `rank` of this server if given."""
        headers = {"Content-Type": "application/json"}
        if rank is not None:
            headers["X-data-parallel-rank"] = str(rank)
        body = {"model": "m", "temperature": 0, "max_tokens": 16, "return_token_ids": True} | body
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=180) as response:
            answer: dict[str, Any] = json.loads(response.read())
        return answer

    def tokens(self, prompt: str, **options: Any) -> list[int]:
        """Greedy token ids of one request."""
        choice = self.complete(prompt=prompt, ignore_eos=True, **options)["choices"][0]
        return list(choice["token_ids"])

    def metric(self, name: str, **labels: str) -> float | None:
        """Return the sum of a metric over its samples with these labels; None if there is no sample."""
        values = [
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics"))
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(values) if values else None

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Its living descendants whose command line contains `name`."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # also a zombie
                if name in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Return the processes that compute: vLLM's workers, or engines that have none."""
        return self.processes("VLLM::Worker") or self.processes("VLLM::EngineCore")

    def tail(self) -> str:
        """Return the end of its log."""
        return self.log.read_text(errors="replace")[-8000:]

    def suspend(self) -> None:
        """SIGSTOP for the whole family, until `resume`, or until we have ended, however we did.

        What is stopped does not hear the signal that it gets when its parent ends.
        """
        self._let_go()
        family = [str(self.process.pid), *(str(member.pid) for member in self.processes())]
        self._waker = subprocess.Popen(
            [*WAKE, *family],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._signal_family(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT for the whole family."""
        self._let_go()
        self._signal_family(signal.SIGCONT)

    def _let_go(self) -> None:
        """Wake what was suspended."""
        if self._waker is not None:
            self._waker.communicate()
            self._waker = None

    def _signal_family(self, sent: signal.Signals) -> None:
        if self.process.poll() is None:
            for member in [psutil.Process(self.process.pid), *self.processes()]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(sent)

    def kill(self) -> None:
        """SIGKILL for the whole family, ranks first; resource trackers end when all others have."""
        family = [*self.ranks(), *self.processes()] if self._is_alive() else []
        self._let_go()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                if not is_tracker(member):
                    member.kill()
        self.process.kill()
        self.process.wait(timeout=STOP_TIMEOUT_S)
        psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)

    def stop(self, sent: signal.Signals = signal.SIGINT) -> int:
        """Ask it to end and return its exit code.

        Raises:
            ServerError: a process of it survived (and was killed now).
        """
        if not self._is_alive():
            return int(self.process.returncode)
        family = self.processes()
        self.process.send_signal(sent)
        try:
            code = self.process.wait(timeout=STOP_TIMEOUT_S)
        finally:
            self.process.kill()
            alive = psutil.wait_procs(family, timeout=20)[1]
            for member in alive:
                member.kill()
        if alive:
            raise ServerError(f"processes of the server were left behind, and killed: {alive}")
        return code

    def _is_alive(self) -> bool:
        return self.process.poll() is None


@contextlib.contextmanager
def serving(
    log: Path, model: str, *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """Yield a ready server of `model`, served as `m`."""
    common = [model, "--served-model-name", "m", "--max-model-len", "2048"]
    with Server([*common, *arguments], log, environment or {}) as server:
        server.wait_until_ready()
        yield server

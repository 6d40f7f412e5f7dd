"""`vllm-dwdp launch`: one `vllm serve` per rank, restarted when it dies, behind vllm-router.

Every rank is a process group of its own, so that whatever a dead server left behind is removed before
its successor starts. The router is the existing load balancer; this module only keeps it running.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_dwdp.entrypoints.gpus import count_gpus, one_gpu_each
from vllm_dwdp.errors import DwdpConfigError, DwdpError

POLL_INTERVAL_S = 0.5
HEALTH_TIMEOUT_S = 2.0
FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 60.0
SETTLED_S = 60.0
STOP_TIMEOUT_S = 30.0
ROUTER = "vllm-router"
READY_PATH = "/ping"
"""Of a rank: 200 when it serves. Its `/health` is 200 from the moment its port is bound."""

_OURS = (
    "--port",
    "--host",
    "--data-parallel-size",
    "--data-parallel-rank",
    "--distributed-executor-backend",
)


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """What to run.

    Args:
        model: as for `vllm serve`.
        num_ranks: servers.
        host: address that the router listens on; the ranks listen on 127.0.0.1 only.
        port: of the router.
        rank_ports: of the ranks.
        rendezvous: the ranks' meeting place.
        arguments: further arguments of every `vllm serve`.
        additional_config: of every `vllm serve`; the rendezvous is added.
    """

    model: str
    num_ranks: int
    host: str
    port: int
    rank_ports: tuple[int, ...]
    rendezvous: str
    arguments: tuple[str, ...]
    additional_config: dict[str, Any]

    def rank_command(self, rank: int) -> list[str]:
        """The `vllm serve` of one rank."""
        dwdp = {"rendezvous": self.rendezvous} | self.additional_config.get("dwdp", {})
        config = self.additional_config | {"dwdp": dwdp}
        return [
            str(Path(sys.executable).with_name("vllm")),
            *("serve", self.model, "--host", "127.0.0.1", "--port", str(self.rank_ports[rank])),
            *("--distributed-executor-backend", "dwdp"),
            *("--data-parallel-size", str(self.num_ranks), "--data-parallel-rank", str(rank)),
            *("--additional-config", json.dumps(config)),
            *self.arguments,
        ]

    def router_command(self) -> list[str]:
        """The load balancer in front of all ranks."""
        urls = [f"http://127.0.0.1:{port}" for port in self.rank_ports]
        return [
            find_router(),
            *("--host", self.host, "--port", str(self.port), "--policy", "round_robin"),
            *("--health-check-interval-secs", "1", "--health-failure-threshold", "1"),
            *("--health-success-threshold", "1", "--health-check-endpoint", READY_PATH),
            *("--prometheus-port", str(free_port())),
            *("--worker-urls", *urls),
        ]


def find_router() -> str:
    """The installed vllm-router.

    Raises:
        DwdpConfigError: it is not installed.
    """
    beside = Path(sys.executable).with_name(ROUTER)
    found = str(beside) if beside.exists() else shutil.which(ROUTER)
    if found is None:
        raise DwdpConfigError(
            "vllm-router is not installed, and launch puts it in front of the ranks. Install it "
            "with `pip install vllm-router` (the extra `launch`), or start the ranks yourself."
        )
    return found


def split_arguments(arguments: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Take `--additional-config` out of arguments for `vllm serve`.

    Raises:
        DwdpConfigError: an argument is ours to give, or the config is no JSON object.
    """
    rest, config, values = [], {}, iter(arguments)
    for argument in values:
        name, separator, value = argument.partition("=")
        if name in _OURS or name.startswith("--data-parallel"):
            raise DwdpConfigError(f"{name} is given by launch; use --ranks, --host and --port.")
        if name != "--additional-config":
            rest.append(argument)
            continue
        text = value if separator else next(values, "")
        try:
            config = json.loads(text)
        except json.JSONDecodeError as error:
            raise DwdpConfigError(f"--additional-config {text!r} is not JSON: {error}.") from error
        if not isinstance(config, dict):
            raise DwdpConfigError(f"--additional-config {text!r} must be a JSON object.")
    return tuple(rest), config


@dataclass
class Child:
    """One process that is kept running.

    Args:
        name: for the terminal.
        command: what to run.
        log: file for its output.
        is_ready: asks whether it answers.
        environment: added to ours.
    """

    name: str
    command: Callable[[], list[str]]
    log: Path
    is_ready: Callable[[], bool]
    environment: dict[str, str] = field(default_factory=dict)
    state: str = "waiting"
    num_restarts: int = 0
    process: subprocess.Popen[bytes] | None = None
    _backoff_s: float = FIRST_BACKOFF_S
    _start_at: float = field(default_factory=time.monotonic)
    _ready_since: float | None = None

    def poll(self) -> bool:
        """Look after it; returns whether its state changed."""
        before = self.state
        if self.process is None:
            if time.monotonic() >= self._start_at:
                self._start()
        elif self.process.poll() is not None:
            self._bury()
        elif self.is_ready():
            self._ready_since = self._ready_since or time.monotonic()
            self.state = "serving"
        elif self.state == "serving":
            self.state = "not answering"
        return self.state != before

    def _start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command(),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment,
                start_new_session=True,
            )
        self.state = "starting"

    def _bury(self) -> None:
        """It died: remove what it left, and start it again after a while."""
        assert self.process is not None
        code = self.process.returncode
        self._kill_group()
        self.process = None
        settled = self._ready_since is not None and (
            time.monotonic() - self._ready_since > SETTLED_S
        )
        self._backoff_s = FIRST_BACKOFF_S if settled else self._backoff_s
        self._start_at = time.monotonic() + self._backoff_s
        self.state = f"ended with {code}, starts again in {self._backoff_s:.0f} s"
        self._backoff_s = min(2 * self._backoff_s, LONGEST_BACKOFF_S)
        self._ready_since = None
        self.num_restarts += 1

    def stop(self) -> None:
        """Ask it to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Return when nothing of it is left."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=STOP_TIMEOUT_S)
            self._kill_group()
            self.process.wait()

    def _kill_group(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def launch(plan: LaunchPlan, logs: Path, report: Callable[[str], None]) -> None:
    """Run until SIGINT or SIGTERM; then end everything.

    Args:
        plan: what to run.
        logs: folder for one log per process.
        report: called with one line whenever something changes.

    Raises:
        DwdpError: a rank ended before it ever served; carries the end of its log.
    """
    find_router()
    logs.mkdir(parents=True, exist_ok=True)
    environments = one_gpu_each(plan.num_ranks, os.environ, count_gpus())
    ranks = [
        _rank_child(plan, rank, logs, environment) for rank, environment in enumerate(environments)
    ]
    router = Child(
        "router", plan.router_command, logs / "router.log", lambda: _answers(plan.port, "/health")
    )
    with _until_interrupted() as interrupted:
        try:
            _serve(plan, ranks, router, report, interrupted)
        finally:
            report("stopping")
            for child in (router, *ranks):
                child.stop()
            for child in (router, *ranks):
                child.end()


def _serve(
    plan: LaunchPlan,
    ranks: list[Child],
    router: Child,
    report: Callable[[str], None],
    interrupted: list[int],
) -> None:
    opened = False
    while not interrupted:
        opened = opened or all(rank.state == "serving" for rank in ranks)
        for child in (*ranks, router) if opened else ranks:
            if child.poll():
                report(_describe(child))
                if child is router and child.state == "serving":
                    report(f"all {plan.num_ranks} ranks serve at http://{plan.host}:{plan.port}")
                if not opened and child.num_restarts:
                    tail = child.log.read_text(errors="replace")[-3000:]
                    raise DwdpError(f"{child.name} ended before it served:\n{tail}")
        time.sleep(POLL_INTERVAL_S)


def _describe(child: Child) -> str:
    pid = "" if child.process is None else f", pid {child.process.pid}"
    again = f", restarts {child.num_restarts}" if child.num_restarts else ""
    return f"{child.name}: {child.state}{pid}{again}"


def _rank_child(plan: LaunchPlan, rank: int, logs: Path, environment: dict[str, str]) -> Child:
    port = plan.rank_ports[rank]
    return Child(
        f"rank {rank}",
        lambda: plan.rank_command(rank),
        logs / f"rank{rank}.log",
        lambda: _answers(port, READY_PATH),
        environment,
    )


def _answers(port: int, path: str) -> bool:
    with contextlib.suppress(OSError):
        url = f"http://127.0.0.1:{port}{path}"
        with urllib.request.urlopen(url, timeout=HEALTH_TIMEOUT_S) as response:
            return bool(response.status == 200)
    return False


@contextlib.contextmanager
def _until_interrupted() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append to."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda signum, _: received.append(signum))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def meeting_folder() -> Iterator[str]:
    """A rendezvous for one launch, removed at its end."""
    folder = tempfile.mkdtemp(prefix="vllm-dwdp-")
    try:
        yield f"unix://{folder}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

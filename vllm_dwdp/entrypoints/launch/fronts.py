"""What is kept running beside the ranks: the router and its relay, decode servers, the control port."""

import contextlib
import http.client
import os
import signal
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_dwdp.entrypoints.launch.admission import ADMISSION_FILE_ENV
from vllm_dwdp.entrypoints.launch.child import Child
from vllm_dwdp.entrypoints.launch.control import ALIVE_PATH
from vllm_dwdp.entrypoints.launch.deadlines import shutdown_timeout_s
from vllm_dwdp.entrypoints.launch.hop import ALIVE_PATH as RELAY_ALIVE_PATH
from vllm_dwdp.entrypoints.launch.plan import RANK_HOST, LaunchPlan
from vllm_dwdp.entrypoints.launch.routed import ENDING_FILE_ENV
from vllm_dwdp.entrypoints.launch.server import READY_PATH

HEALTH_TIMEOUT_S = 2.0

ROUTER_ALIVE_PATH = "/liveness"
ROUTER_READY_PATH = "/readiness"
"""200 while it has a healthy rank."""

_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""`http_proxy` is for what lies outside; a proxy cannot reach our loopback."""


def answers(url: str) -> bool:
    """Whether `GET url` is answered with 200, in time."""
    with (
        contextlib.suppress(OSError, http.client.HTTPException),
        _WITHOUT_PROXY.open(url, timeout=HEALTH_TIMEOUT_S) as response,
    ):
        return bool(response.status == 200)
    return False


def admission_file(logs: Path) -> Path:
    """Return the file that says which decode servers get requests; the relay reads it."""
    return logs.absolute() / f"decode-{os.getpid()}.json"


def ending_file(logs: Path) -> Path:
    """Return the file that exists once this launch is told to end; ranks and relay look for it."""
    return logs.absolute() / f"ending-{os.getpid()}"


def router_child(plan: LaunchPlan, logs: Path) -> Child:
    """Return the load balancer in front of the ranks, not started yet."""

    def progress() -> str:
        return "waits for a rank to be healthy" if answers(plan.url + ROUTER_ALIVE_PATH) else ""

    return Child(
        "router",
        plan.router_command,
        logs / "router.log",
        is_ready=lambda: answers(plan.url + ROUTER_READY_PATH),
        progress=progress,
        environment=loopback_without_proxy(os.environ),
        end_signal=signal.SIGTERM,  # until it listens it does not hear SIGINT
    )


def relay_children(plan: LaunchPlan, logs: Path) -> list[Child]:
    """Make the relay, which the router of a disaggregated launch asks in place of the ranks."""
    if plan.disaggregation is None or not plan.has_router:
        return []

    alive = f"http://{RANK_HOST}:{plan.disaggregation.relay_ports[-1]}{RELAY_ALIVE_PATH}"
    return [
        Child(
            "relay",
            plan.relay_command,
            logs / "relay.log",
            is_ready=lambda: answers(alive),
            progress=str,
            environment={
                ENDING_FILE_ENV: str(ending_file(logs)),
                ADMISSION_FILE_ENV: str(admission_file(logs)),
            },
            end_signal=signal.SIGTERM,
        )
    ]


def decode_children(
    plan: LaunchPlan, logs: Path, environments: Sequence[dict[str, str]], start_timeout_s: float
) -> list[Child]:
    """Return the decode servers that launch starts, not started yet."""
    if plan.disaggregation is None:
        return []

    def child(index: int) -> Child:
        assert plan.disaggregation is not None
        url = plan.disaggregation.urls[index]
        return Child(
            f"decode {index}",
            lambda: plan.decode_command(index),
            logs / f"decode{index}.log",
            is_ready=lambda: answers(url + READY_PATH),
            progress=str,
            environment=environments[index] | plan.disaggregation.side_channel(1 + index),
            start_timeout_s=start_timeout_s,
            drain_s=shutdown_timeout_s((*plan.arguments, *plan.disaggregation.decode_arguments)),
            place=f"decode at {url}",
        )

    return [child(index) for index in range(len(plan.disaggregation.decode_ports))]


def control_children(plan: LaunchPlan, logs: Path) -> list[Child]:
    """Make what repeats control requests on every rank, not started; nothing unless it was asked for."""
    if plan.control_port is None:
        return []
    return [
        Child(
            "control",
            plan.control_command,
            logs / "control.log",
            is_ready=lambda: answers(plan.control_url + ALIVE_PATH),
            progress=str,
            end_signal=signal.SIGTERM,
        )
    ]


def loopback_without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep the router from asking a proxy for our ranks."""
    given = [environment.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    hosts = ",".join(dict.fromkeys([*filter(None, given), RANK_HOST, "localhost"]))
    return {"no_proxy": hosts, "NO_PROXY": hosts}

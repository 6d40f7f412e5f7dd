"""What clients of a launch talk to, kept running beside its ranks: the router, and the control port."""

import contextlib
import http.client
import os
import signal
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from vllm_dwdp.entrypoints.launch.child import Child
from vllm_dwdp.entrypoints.launch.control import ALIVE_PATH
from vllm_dwdp.entrypoints.launch.plan import RANK_HOST, LaunchPlan

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


def router_child(plan: LaunchPlan, logs: Path) -> Child:
    """The load balancer in front of the ranks, not started yet."""

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


def control_children(plan: LaunchPlan, logs: Path) -> list[Child]:
    """What repeats control requests on every rank, not started yet; nothing unless it was asked for."""
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
    """The variables that keep the router from asking a proxy for our ranks."""
    given = [environment.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    hosts = ",".join(dict.fromkeys([*filter(None, given), RANK_HOST, "localhost"]))
    return {"no_proxy": hosts, "NO_PROXY": hosts}

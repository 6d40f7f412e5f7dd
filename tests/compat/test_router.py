"""What of vllm-router `launch --decode-servers` relies on, with small servers in its care."""

import http.server
import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.waiting import wait_until
from tests.unit.entrypoints.test_relay import served
from vllm_dwdp.entrypoints.launch import fronts
from vllm_dwdp.entrypoints.launch.disaggregation import Disaggregation
from vllm_dwdp.entrypoints.launch.fronts import answers
from vllm_dwdp.entrypoints.launch.plan import LaunchPlan
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.relay import DECODE

pytestmark = [pytest.mark.compat, pytest.mark.timeout(60)]


class Listener(http.server.ThreadingHTTPServer):
    """Answers everything, and keeps the ids of requests."""

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.ids: list[str] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Listener

    def do_GET(self) -> None:
        self._answer(b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.ids.append(self.headers["X-Request-Id"])
        choices = [{"index": 0, "text": "a", "finish_reason": "stop"}]
        self._answer(json.dumps({"choices": choices, "kv_transfer_params": {}}).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def routed(tmp_path: Path) -> Iterator[tuple[LaunchPlan, Listener, list[Listener]]]:
    """Yield the router of a launch, what stands for its relay, and two decode servers."""
    pytest.importorskip("vllm_router")
    port, relay_port, *decode_ports = free_ports(4)
    plan = LaunchPlan(
        model="m",
        num_ranks=1,
        host="127.0.0.1",
        port=port,
        rank_ports=(relay_port,),
        rendezvous="",
        arguments=(),
        additional_config={},
        disaggregation=Disaggregation(
            decode_ports=tuple(decode_ports), relay_ports=(relay_port,), side_channel_ports=()
        ),
    )
    with ExitStack() as stack:
        relay, *decodes = (Listener(each) for each in (relay_port, *decode_ports))
        for each in (relay, *decodes):
            stack.enter_context(served(each))
        log = stack.enter_context((tmp_path / "router.log").open("wb"))
        router = subprocess.Popen(plan.router_command(), stdout=log, stderr=log)
        stack.callback(router.wait, timeout=20)
        stack.callback(router.kill)
        wait_until(lambda: answers(plan.url + fronts.ROUTER_READY_PATH), timeout_s=30)
        yield plan, relay, decodes


def ask(plan: LaunchPlan) -> int:
    request = urllib.request.Request(
        plan.url + "/v1/completions",
        json.dumps({"model": "m", "prompt": "a"}).encode(),
        {"Content-Type": "application/json", "X-Request-Id": "the client's own"},
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_router_names_the_decode_server_and_can_forget_one(
    routed: tuple[LaunchPlan, Listener, list[Listener]],
) -> None:
    plan, relay, decodes = routed
    assert [ask(plan) for _ in range(4)] == [200] * 4
    named = [DECODE.search(each) for each in relay.ids]
    assert {each and each[1] for each in named} == {
        f"127.0.0.1:{each.server_port}" for each in decodes
    }
    assert all(each.ids for each in decodes)
    before = len(decodes[0].ids)
    fronts.forget_decode(plan, plan.decode_urls[0])
    assert [ask(plan) for _ in range(4)] == [200] * 4
    assert len(decodes[0].ids) == before

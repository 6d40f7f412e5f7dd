"""What of vllm-router `launch --decode-servers` relies on, with small servers in its care."""

import http.server
import json
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from numpy import float32

from tests.helpers.waiting import wait_until
from tests.unit.entrypoints.launch.servers import served
from vllm_dwdp.entrypoints.launch import fronts
from vllm_dwdp.entrypoints.launch.disaggregation import Disaggregation
from vllm_dwdp.entrypoints.launch.door import DoorServer
from vllm_dwdp.entrypoints.launch.fronts import answers
from vllm_dwdp.entrypoints.launch.plan import LaunchPlan
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.relay import DECODE

pytestmark = pytest.mark.timeout(60)


class Listener(http.server.ThreadingHTTPServer):
    """Answers everything as it was told to, and keeps the headers of requests."""

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.headers: list[Message] = []
        self.choice: dict[str, Any] = {"index": 0, "text": "a", "finish_reason": "stop"}
        self.status = self.health = 200
        self.location = ""
        self.may_end = threading.Event()

    @property
    def ids(self) -> list[str]:
        return [each["X-Request-Id"] for each in self.headers]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Listener

    def do_GET(self) -> None:
        self._answer(self.server.health, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        self.server.headers.append(self.headers)
        if body.get("stream") and self.server.status == 200:
            self._stream()
            return
        told = {"choices": [self.server.choice], "kv_transfer_params": {}}
        self._answer(self.server.status, json.dumps(told).encode())

    def _stream(self) -> None:
        """Two events, the second one when it may come; the connection ends the stream."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"data: {}\n\n")
        self.wfile.flush()
        self.server.may_end.wait(20)
        self.wfile.write(b"data: [DONE]\n\n")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Retry-After", "7")
        self.send_header("Location", self.server.location)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def routed(tmp_path: Path) -> Iterator[tuple[LaunchPlan, Listener, list[Listener]]]:
    """Yield the router of a launch, what stands for its relay, and two decode servers' doors."""
    pytest.importorskip("vllm_router")
    port, relay_port, *door_ports = free_ports(4)
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
            door_ports=tuple(door_ports), relay_ports=(relay_port,), side_channel_ports=()
        ),
    )
    with ExitStack() as stack:
        relay, *decodes = (Listener(each) for each in (relay_port, *door_ports))
        for each in (relay, *decodes):
            stack.enter_context(served(each))
        log = stack.enter_context((tmp_path / "router.log").open("wb"))
        router = subprocess.Popen(plan.router_command(), stdout=log, stderr=log)
        stack.callback(router.wait, timeout=20)
        stack.callback(router.kill)
        wait_until(lambda: answers(plan.url + fronts.ROUTER_READY_PATH), timeout_s=30)
        yield plan, relay, decodes


@dataclass(frozen=True)
class Answered:
    """What a client sees."""

    status: int
    headers: Message
    text: str


def ask(plan: LaunchPlan, **body: Any) -> Answered:
    request = urllib.request.Request(
        plan.url + "/v1/completions",
        json.dumps({"model": "m", "prompt": "a"} | body).encode(),
        {
            "Content-Type": "application/json",
            "X-Request-Id": "the client's own",
            "Authorization": "Bearer the client's own",
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return Answered(response.status, response.headers, response.read().decode())
    except urllib.error.HTTPError as error:
        return Answered(error.code, error.headers, error.read().decode())


Routed = tuple[LaunchPlan, Listener, list[Listener]]


def test_the_router_names_the_door_of_the_decode_server(routed: Routed) -> None:
    plan, relay, doors = routed
    assert [ask(plan).status for _ in range(4)] == [200] * 4
    named = [DECODE.search(each) for each in relay.ids]
    assert plan.disaggregation is not None
    doors_named = {int(each[1]) for each in named if each}
    assert doors_named == {*plan.disaggregation.door_ports}
    assert all(each.ids for each in doors)


def test_the_router_drops_the_clients_key(routed: Routed) -> None:
    """`launch` refuses --api-key therefore."""
    plan, relay, doors = routed
    ask(plan)
    sent = [each["Authorization"] for server in (relay, *doors) for each in server.headers]
    assert len(sent) == 2 and not any("client" in each for each in sent)


def test_the_router_passes_a_refusal_of_a_decode_server_on(routed: Routed) -> None:
    """But makes a 500 of one of a prefill server: so the doors refuse."""
    plan, relay, doors = routed
    for door in doors:
        door.status = 503
    refused = ask(plan)
    assert (refused.status, refused.headers["Retry-After"]) == (503, "7")
    assert json.loads(refused.text)["choices"]
    relay.status = 503
    assert ask(plan).status == 500


def test_the_router_goes_where_a_door_sends_it(routed: Routed) -> None:
    plan, _, (door, decode) = routed
    door.status = 307
    door.location = f"http://127.0.0.1:{decode.server_port}/v1/completions"
    assert [ask(plan).status for _ in range(4)] == [200] * 4
    assert (len(door.ids), len(decode.ids)) == (2, 4)


def test_a_stream_comes_piece_by_piece_behind_a_door(routed: Routed) -> None:
    plan, _, (decode, other) = routed
    with served(DoorServer("127.0.0.1", 0, f"http://127.0.0.1:{decode.server_port}")) as door:
        other.status = 307
        other.location = f"{door}/v1/completions"
        for _ in range(
            2
        ):  # to the decode server itself, and over a door to which the other one sends
            request = urllib.request.Request(
                plan.url + "/v1/completions",
                json.dumps({"model": "m", "prompt": "a", "stream": True}).encode(),
                {"Content-Type": "application/json"},
            )
            decode.may_end.clear()
            with urllib.request.urlopen(request, timeout=20) as stream:
                assert stream.readline() == b"data: {}\n"
                decode.may_end.set()
                assert stream.read() == b"\ndata: [DONE]\n\n"
    assert other.ids and len(decode.ids) == 2


def test_the_router_takes_a_decode_server_out_and_back(routed: Routed) -> None:
    plan, _, (other, door) = routed
    door.health = 503
    wait_until(lambda: healthy_decodes(plan) == 1, timeout_s=20)
    before = len(door.ids)
    assert [ask(plan).status for _ in range(4)] == [200] * 4
    assert len(door.ids) == before
    door.health = 200
    wait_until(lambda: healthy_decodes(plan) == 2, timeout_s=20)
    assert [ask(plan).status for _ in range(4)] == [200] * 4
    assert len(door.ids) > before and other.ids


def healthy_decodes(plan: LaunchPlan) -> int:
    with urllib.request.urlopen(plan.url + fronts.ROUTER_READY_PATH, timeout=20) as response:
        return int(json.loads(response.read())["decode"]["healthy"])


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/add_worker?url={}", None),
        ("/add_worker?url={}&worker_type=decode", None),
        ("/workers", {"worker_type": "decode"}),
    ],
)
def test_no_route_of_the_router_adds_a_decode_server(
    routed: Routed, route: str, body: dict[str, str] | None
) -> None:
    """So `launch` removes none, and its doors are unhealthy instead."""
    plan, *_ = routed
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    asked = urllib.request.Request(
        plan.url + route.format(quote(url)),
        body and json.dumps(body | {"url": url}).encode(),
        {"Content-Type": "application/json"},
        method="POST",
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked, timeout=20)
    assert refused.value.code == 400
    assert "add_decode_server methods" in refused.value.read().decode()


def test_the_router_changes_the_last_bit_of_a_log_probability(routed: Routed) -> None:
    """Where it is asked for one it writes the answer anew; what an engine computes is float32."""
    plan, relay, doors = routed
    values = [float(float32(-1.0 - number / 7)) for number in range(200)]
    for each in (relay, *doors):
        each.choice = each.choice | {"logprobs": {"token_logprobs": values}}
    (choice,) = json.loads(ask(plan, logprobs=1).text)["choices"]
    told = choice["logprobs"]["token_logprobs"]
    assert [float32(value) for value in told] == [float32(value) for value in values]
    assert told != values, "compare all of its bits in tests/e2e/test_disaggregated.py"

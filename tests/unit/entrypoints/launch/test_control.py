"""The control port, in front of small servers in the place of ranks."""

import http.client
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from vllm_dwdp.entrypoints.launch.control import ControlServer
from vllm_dwdp.entrypoints.launch.ports import free_ports

pytestmark = pytest.mark.timeout(60)


class Rank(http.server.BaseHTTPRequestHandler):
    """Notes what it is asked, and answers what its server was told to."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.asked.append((self.command, self.path, headers, body))
        status, content = self.server.answer
        self.server.together.wait(timeout=20)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def served(server: Any) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    with server:
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def ranks() -> Iterator[list[Any]]:
    together = threading.Barrier(2)
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            rank: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rank)
            rank.asked, rank.answer, rank.together = [], (200, b'{"status": "paused"}'), together
            made.append(stack.enter_context(served(rank)))
        yield made


@pytest.fixture
def control(ranks: list[Any]) -> Iterator[ControlServer]:
    urls = [f"http://127.0.0.1:{rank.server_port}" for rank in ranks]
    with served(ControlServer("127.0.0.1", 0, urls)) as server:
        yield server


def ask(
    control: ControlServer, target: str, body: bytes = b"", method: str = "POST", **headers: str
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", control.server_port, timeout=30)
    try:
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_every_rank_is_asked_the_same_at_once(ranks: list[Any], control: ControlServer) -> None:
    """Each waits for the other, so that one after the other would not do."""
    given = {"Authorization": "Bearer k", "X-Data-Parallel-Rank": "1", "X-Request-Id": "7"}
    status, answer = ask(control, "/pause?mode=keep", b"[1]", **given)
    paused = {"status": 200, "answer": {"status": "paused"}}
    assert (status, answer) == (200, {"status": "paused", "ranks": [paused, paused]})
    for rank in ranks:
        ((method, path, headers, body),) = rank.asked
        assert (method, path, body) == ("POST", "/pause?mode=keep", b"[1]")
        assert (headers["authorization"], headers["x-request-id"]) == ("Bearer k", "7")
        assert "x-data-parallel-rank" not in headers


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"done"])
def test_answers_that_are_no_objects(
    content: bytes, ranks: list[Any], control: ControlServer
) -> None:
    for rank in ranks:
        rank.answer = (200, content)
    status, answer = ask(control, "/is_paused", method="GET")
    shown = [1, 2] if content.startswith(b"[") else content.decode()
    assert (status, answer) == (200, {"ranks": 2 * [{"status": 200, "answer": shown}]})
    assert [rank.asked[0][0] for rank in ranks] == ["GET", "GET"]


def test_what_was_half_done_is_named(ranks: list[Any], control: ControlServer) -> None:
    ranks[1].answer = (503, b'{"error": "it waits"}')
    status, answer = ask(control, "/resume")
    assert status == answer["error"]["code"] == 503
    assert answer["error"]["message"] == (
        "POST /resume: rank 1 answered 503 (ranks [1] of 2 failed), and ranks [0] did it, which is not "
        "undone. Repeat the request when the reason is gone."
    )
    assert answer["ranks"][1] == {"status": 503, "answer": {"error": "it waits"}}


def test_a_rank_that_is_gone_fails_the_request(ranks: list[Any]) -> None:
    ranks[0].together = threading.Barrier(1)
    (gone,) = free_ports(1)
    urls = [f"http://127.0.0.1:{port}" for port in (ranks[0].server_port, gone)]
    with served(ControlServer("127.0.0.1", 0, urls)) as control:
        status, answer = ask(control, "/resume")
    assert status == 502
    assert "rank 1 answered 502 (ranks [1] of 2 failed), and ranks [0] did it" in str(answer)
    assert "no answer: [Errno 111] Connection refused" in answer["ranks"][1]["answer"]


def test_all_failed(ranks: list[Any], control: ControlServer) -> None:
    for rank in ranks:
        rank.answer = (404, b"{}")
    status, answer = ask(control, "/sleep?level=1")
    assert status == 404
    assert answer["error"]["message"] == (
        "POST /sleep?level=1: rank 0 answered 404 (ranks [0, 1] of 2 failed). Repeat the request when "
        "the reason is gone."
    )


def test_what_is_for_one_rank_is_not_repeated(ranks: list[Any], control: ControlServer) -> None:
    status, answer = ask(control, "/v1/completions")
    assert status == 404
    message = answer["error"]["message"]
    assert message.startswith(
        "POST /v1/completions is not for every rank; this port takes /abort_req"
    )
    assert not ranks[0].asked and not ranks[1].asked
    assert ask(control, "/health", method="GET") == (200, {})


def test_a_body_without_a_length_is_refused(control: ControlServer) -> None:
    status, answer = ask(control, "/pause", b"", **{"Transfer-Encoding": "chunked"})
    assert (status, answer["error"]["message"]) == (
        411,
        "send the length of the body (Content-Length)",
    )

"""The control port of a launch: one request of `CONTROL_ROUTES` is repeated on every rank.

A process of its own beside the router, which can pass a request to one rank only. The answer says for
each rank what it answered. Nothing is undone where some ranks did it and others did not; the answer says
so.

    python -m vllm_dwdp.entrypoints.launch.control HOST PORT URL_OF_RANK_0 URL_OF_RANK_1 ...
"""

import http.client
import http.server
import json
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vllm_dwdp.entrypoints.launch.routed import CONTROL_ROUTES

ANSWER_TIMEOUT_S = 600.0
"""`/pause?mode=wait` lasts as long as the longest running request."""
NO_ANSWER = 502
"""Status of a rank that does not answer."""
ALIVE_PATH = "/health"
PASSED_ON = ("Accept", "Authorization", "Content-Type", "X-Request-Id")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked, and is repeated."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def name(self) -> str:
        """For a sentence."""
        return f"{self.method} {self.target}"

    @property
    def path(self) -> str:
        """Without the query."""
        return urlsplit(self.target).path


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rank made of it: a status, and the JSON, the text or the error."""

    status: int
    answer: Any

    @property
    def is_done(self) -> bool:
        """Whether the rank did it."""
        return 200 <= self.status < 300


def ask(url: str, request: Request) -> Outcome:
    """Repeat a request on one rank."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(
        place.hostname or "", place.port, timeout=ANSWER_TIMEOUT_S
    )
    try:
        connection.request(request.method, request.target, request.body, request.headers)
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return Outcome(status=NO_ANSWER, answer=f"no answer: {error or type(error).__name__}")
    finally:
        connection.close()
    return Outcome(status=response.status, answer=_json_or_text(text))


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def repeat(urls: Sequence[str], request: Request) -> tuple[int, dict[str, Any]]:
    """Repeat a request on every rank at once; the status and the body of the answer to it."""
    with ThreadPoolExecutor(len(urls)) as pool:
        outcomes = list(pool.map(lambda url: ask(url, request), urls))
    ranks = [{"status": each.status, "answer": each.answer} for each in outcomes]
    failed = [rank for rank, outcome in enumerate(outcomes) if not outcome.is_done]
    if not failed:
        first = outcomes[0].answer
        return 200, (first if isinstance(first, dict) else {}) | {"ranks": ranks}
    done = [rank for rank, outcome in enumerate(outcomes) if outcome.is_done]
    undone = f", and ranks {done} did it, which is not undone" if done else ""
    message = (
        f"{request.name}: rank {failed[0]} answered {ranks[failed[0]]['status']} "
        f"(ranks {failed} of {len(urls)} failed){undone}. Repeat the request when the reason is gone."
    )
    return outcomes[failed[0]].status, _error(message, outcomes[failed[0]].status) | {
        "ranks": ranks
    }


def _error(message: str, status: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": "ControlError", "param": None, "code": status}}


class ControlServer(http.server.ThreadingHTTPServer):
    """Listens for control requests, one thread each."""

    def __init__(self, host: str, port: int, urls: Sequence[str]) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        self.urls = tuple(urls)
        super().__init__(address[:2], _Handler)  # type: ignore[arg-type]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ControlServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self._answer(*self._outcome())

    do_GET = do_POST

    def _outcome(self) -> tuple[int, dict[str, Any]]:
        if self.command == "GET" and self.path == ALIVE_PATH:
            return 200, {}
        length = self.headers.get("Content-Length") or "0"
        if "Transfer-Encoding" in self.headers or not length.isdecimal():
            self.close_connection = True
            return 411, _error("send the length of the body (Content-Length)", 411)
        request = Request(
            method=self.command,
            target=self.path,
            headers={name: self.headers[name] for name in PASSED_ON if name in self.headers},
            body=self.rfile.read(int(length)),
        )
        if request.path not in CONTROL_ROUTES:
            known = ", ".join(sorted(CONTROL_ROUTES))
            message = f"{request.name} is not for every rank; this port takes {known} only."
            return 404, _error(message, 404)
        return repeat(self.server.urls, request)

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main(host: str, port: str, *urls: str) -> None:
    """Serve until the process is ended."""
    with ControlServer(host, int(port), urls) as server:
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])

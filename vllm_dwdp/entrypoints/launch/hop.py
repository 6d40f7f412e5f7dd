"""One HTTP hop between the router and the servers of a disaggregated launch.

Runs in the relay's process, a thread for each connection.
"""

import http.client
import http.server
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from vllm_dwdp.entrypoints.launch.routed import ENDING_FILE_ENV, ENDS, RETRY_AFTER_S

HOST = "127.0.0.1"
HEALTH_TIMEOUT_S = 4.0
ALIVE_PATH = "/relay/alive"
"""Answered with 200 while every port of this process answers, whatever the servers behind them do."""
PORT_PATH = "/relay/port"
"""The same for the port that is asked."""
ALIVE_TIMEOUT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server answered, or we do."""

    status: int
    content_type: str = "application/json"
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


ALIVE = Answer(status=200)


def ask(
    url: str, method: str, target: str, body: bytes, headers: dict[str, str], timeout_s: float
) -> Answer | None:
    """Ask one server; None where it gives no answer."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=timeout_s)
    try:
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        return Answer(
            status=response.status,
            content_type=response.getheader("Content-Type") or "application/json",
            body=response.read(),
        )
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def refusal(reason: str) -> Answer:
    """Return a 503 that says why, in the form of vLLM's own errors."""
    error = {"message": reason, "type": "ServiceUnavailableError", "param": None, "code": 503}
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return Answer(status=503, body=json.dumps({"error": error}).encode(), headers=headers)


def reason_to_end() -> str:
    """Why nothing new is taken; empty until the launch ends."""
    return ENDS if os.path.exists(os.environ.get(ENDING_FILE_ENV, "")) else ""


class HopServer(http.server.ThreadingHTTPServer):
    """Listens in the place of one server.

    Args:
        host: address to listen on.
        port: to listen at.
        handler: of its requests.
    """

    daemon_threads = True
    request_queue_size = 1024
    beside: Sequence["HopServer"] = ()
    """All that listen in this process."""

    def __init__(self, host: str, port: int, handler: "type[Hop]") -> None:
        super().__init__((host, port), handler)

    def answers(self) -> bool:
        """Whether a request that comes to our port is answered; another thread must do that."""
        host, port = self.server_address[:2]
        url = f"http://{host!s}:{port}"
        answer = ask(url, "GET", PORT_PATH, b"", {}, ALIVE_TIMEOUT_S)
        return answer is not None and answer.status == 200

    def health(self) -> Answer:
        """Ask every port of this process, and answer whether all answered."""
        silent = [hop.server_port for hop in self.beside if not hop.answers()]
        return refusal(f"The relay's ports {silent} do not answer.") if silent else ALIVE


class Hop(http.server.BaseHTTPRequestHandler):
    """Reads a request and writes an answer; keeps the connection."""

    server: HopServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Health and figures are those of the server; a probe of this process has paths of its own."""
        if self.path == PORT_PATH:
            self._answer(ALIVE)
        elif self.path == ALIVE_PATH:
            self._answer(self.server.health())
        else:
            self._answer_for_server()

    def _answer_for_server(self) -> None:
        raise NotImplementedError

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or "0"))

    def _answer(self, answer: Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def _answer_health(self, url: str, refused: str) -> None:
        """Answer as a server does, or that it is not to be chosen."""
        if refused:
            self._answer(refusal(refused))
            return
        answer = ask(url, "GET", self.path, b"", {}, HEALTH_TIMEOUT_S)
        self._answer(answer or refusal(f"{url} does not answer."))

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Log no request: the servers do."""

"""Small real servers in the place of ranks and decode servers."""

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Rank(http.server.ThreadingHTTPServer):
    """Answers with a status and its name; status 0 closes the connection, as one that dies does."""

    def __init__(self, name: str, status: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.status = name, status
        self.asked: list[tuple[str, str | None, bytes]] = []
        self.on_request: Callable[[], object] = bool


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Rank

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.path, self.headers["X-Request-Id"], body))
        self.server.on_request()
        if self.server.status == 0:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        answer = json.dumps({"by": self.server.name}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def served(server: http.server.ThreadingHTTPServer) -> Iterator[str]:
    with server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def healthy_server() -> Iterator[int]:
    """Yield the port of a server that is well, whoever asks."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()

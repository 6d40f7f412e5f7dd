"""The HTTP port while a server's ranks start: alive, not ready, and it says why.

Stock vLLM binds its port before the engines start and listens once they are up, so that until then
it cannot be told from a dead one; a DWDP rank may wait minutes for a peer. Here a thread of the front
end listens on vLLM's own socket meanwhile:

- `GET /health` is 200: the process lives. Everything else, also `/ping`, is 503 with the reason.
- When the engines are up the thread stops accepting; connections that are waiting then, and all
  later ones, are vLLM's. Nothing is refused in between, because the socket stays the same.

Once a server is ready everything is stock: `/ping` and `/health` both ask the engine. So `/ping` tells
readiness at any time, and `/health` tells liveness. Not with TLS and not with vLLM's Rust front end.
"""

import contextlib
import functools
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vllm_dwdp.distributed.launch import DwdpLaunch, Seat
from vllm_dwdp.distributed.membership import query_status
from vllm_dwdp.errors import DwdpError

SERVER_MODULES = ("vllm.entrypoints.cli.serve", "vllm.entrypoints.launchers.api_server.entry")
"""Where `setup_server` is looked up by name."""

RETRY_AFTER_S = 5
BACKLOG = 2048
MAX_CONNECTIONS = 64
CONNECTION_TIMEOUT_S = 5.0
MAX_BODY_BYTES = 2**20
REASON_AGE_S = 1.0


def install(is_chosen: Callable[[Any], bool]) -> None:
    """Wrap `setup_server` where this process has it; acts only on arguments that `is_chosen`."""
    for name in SERVER_MODULES:
        module = sys.modules.get(name)
        stock = getattr(module, "setup_server", None)
        if stock is not None and not hasattr(stock, "dwdp_stock"):
            setattr(module, "setup_server", _holding(stock, is_chosen))  # noqa: B010


def _holding(stock: Any, is_chosen: Callable[[Any], bool]) -> Any:
    @functools.wraps(stock)
    def setup_server(args: Any, **kwargs: Any) -> Any:
        listen_address, sock = stock(args, **kwargs)
        if is_chosen(args) and not args.ssl_keyfile and not _has_rust_front_end():
            global _holder
            _holder = Holder(sock)
        return listen_address, sock

    setup_server.dwdp_stock = stock  # type: ignore[attr-defined]
    return setup_server


def _has_rust_front_end() -> bool:
    from vllm import envs

    return bool(envs.VLLM_USE_RUST_FRONTEND and envs.VLLM_RUST_FRONTEND_PATH)


def explain_by(launch: DwdpLaunch) -> None:
    """From now on the reason is what the ranks of this front end say they do."""
    if _holder is not None:
        _holder.reason = _Reason(launch)


def release() -> None:
    """The engines are up: leave the port to vLLM."""
    global _holder
    if _holder is not None:
        holder, _holder = _holder, None
        holder.stop()


class Holder:
    """Answers at a bound socket until `stop`; the socket stays its maker's and stays open."""

    def __init__(self, sock: socket.socket) -> None:
        self.reason: Callable[[], str] = lambda: "the server reads its configuration"
        self._server = _Server(sock, self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="dwdp-admission", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Accept no more; what was accepted is still answered."""
        self._server.shutdown()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    """A thread per connection; of more than `MAX_CONNECTIONS` the oldest makes room for a new one."""

    daemon_threads = True

    def __init__(self, sock: socket.socket, holder: Holder) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.holder = holder
        self._open: dict[socket.socket, None] = {}
        self._lock = threading.Lock()
        sock.listen(BACKLOG)
        sock.setblocking(False)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.settimeout(CONNECTION_TIMEOUT_S)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            while len(self._open) >= MAX_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread ends, and closes it
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up or speaks no HTTP is no concern of ours."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "vllm-dwdp"
    sys_version = ""

    def _answer(self) -> None:
        reason = self.server.holder.reason()
        is_health = self.path.partition("?")[0] == "/health" and self.command in ("GET", "HEAD")
        if is_health:
            content: dict[str, Any] = {"state": "starting", "reason": reason}
        else:
            error = {"message": reason, "type": "service_unavailable", "param": None, "code": 503}
            content = {"error": error}
        self._drain()
        body = json.dumps(content).encode()
        self.send_response(200 if is_health else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        if not is_health:
            self.send_header("Retry-After", str(RETRY_AFTER_S))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = _answer

    def _drain(self) -> None:
        """Read the request's body, or hanging up would take back the answer."""
        length = self.headers.get("Content-Length", "")
        if length.isascii() and length.isdigit():
            self.rfile.read(min(int(length), MAX_BODY_BYTES))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: probes come every second."""


class _Reason:
    """What the ranks of a front end say they do; asked at most once a second."""

    def __init__(self, launch: DwdpLaunch) -> None:
        self._launch = launch
        self._lock = threading.Lock()
        self._asked_at = 0.0
        self._text = ""

    def __call__(self) -> str:
        with self._lock:
            if time.monotonic() - self._asked_at > REASON_AGE_S:
                self._text = "; ".join(self._ask(seat) for seat in self._launch.seats)
                self._asked_at = time.monotonic()
            return self._text

    def _ask(self, seat: Seat) -> str:
        if not self._launch.config.shares_experts:
            return f"rank {seat.rank} loads the model"
        status: dict[str, Any] = {}
        with contextlib.suppress(DwdpError, OSError):
            status = query_status(self._launch.endpoint, seat.group, seat.dwdp_rank, timeout_s=1.0)
        if not status:
            return f"rank {seat.rank} starts"
        return f"rank {seat.rank} {status.get('doing', 'has its experts and warms up')}"


_holder: Holder | None = None

"""The port while ranks start: alive, not ready, with the reason; then the socket is another's."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.compat.frontend import admission
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.launch import DwdpLaunch, RankSpan
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.membership import Membership


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    """As vLLM's: bound, not listening."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        yield made


def ask(bound: socket.socket, path: str, body: bytes | None = None) -> tuple[int, Any, Any]:
    url = f"http://127.0.0.1:{bound.getsockname()[1]}{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=20) as response:
            return response.status, json.loads(response.read()), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), error.headers


def test_it_is_alive_and_not_ready_and_says_why(bound: socket.socket) -> None:
    holder = admission.Holder(bound)
    holder.reason = lambda: "rank 1 waits for ranks [0] to publish their experts (3 s of 600 s)"
    status, content, _ = ask(bound, "/health")
    assert (status, content["state"]) == (200, "starting")
    for path, body in (("/ping", None), ("/v1/models", None), ("/v1/completions", b"x" * 200_000)):
        status, content, headers = ask(bound, path, body)
        assert status == 503
        assert content["error"]["message"].startswith("rank 1 waits for ranks [0]")
        assert headers["Retry-After"] == "5"
    holder.stop()


def test_what_comes_after_the_end_is_the_next_ones(bound: socket.socket) -> None:
    """No connection is refused in between: it waits in the socket that vLLM goes on with."""
    holder = admission.Holder(bound)
    assert ask(bound, "/health")[0] == 200
    holder.stop()
    with socket.create_connection(bound.getsockname(), timeout=5) as early:
        early.sendall(b"GET / HTTP/1.1\r\n\r\n")
        bound.listen(2048)
        bound.setblocking(True)
        accepted, _ = bound.accept()
        assert accepted.recv(100).startswith(b"GET /")
        accepted.close()


def test_a_crowd_that_says_nothing_does_not_grow_it(
    bound: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "CONNECTION_TIMEOUT_S", 0.5)
    holder = admission.Holder(bound)
    before = threading.active_count()
    crowd = [socket.create_connection(bound.getsockname(), timeout=20) for _ in range(200)]
    try:
        for connection in crowd[:100]:
            with suppress(ConnectionError):
                connection.sendall(b"\xff" * 300 + b"\r\n")
        wait_until(lambda: threading.active_count() <= before + admission.MAX_CONNECTIONS)
        deadline = time.monotonic() + 30
        while True:
            with suppress(OSError):
                assert ask(bound, "/health")[0] == 200
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for connection in crowd:
            connection.close()
        holder.stop()


def test_a_crowd_that_never_finishes_its_requests_keeps_no_probe_out(bound: socket.socket) -> None:
    """Each line comes in time, the request never ends: a liveness probe must get through."""
    holder = admission.Holder(bound)
    stop = threading.Event()
    crowd = [
        socket.create_connection(bound.getsockname(), timeout=20)
        for _ in range(2 * admission.MAX_CONNECTIONS)
    ]

    def trickle() -> None:
        while not stop.wait(0.1):
            for number, connection in enumerate(crowd):
                with suppress(OSError):
                    connection.sendall(
                        b"GET /v1/models HTTP/1.1\r\n" if number % 2 else b"X: y\r\n"
                    )

    trickler = threading.Thread(target=trickle)
    trickler.start()
    try:
        for _ in range(20):
            assert ask(bound, "/health")[0] == 200
            time.sleep(0.05)
    finally:
        stop.set()
        trickler.join()
        for connection in crowd:
            connection.close()
        holder.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_reason_is_what_the_ranks_say(tmp_path: Path, bound: socket.socket) -> None:
    endpoint = parse_endpoint(f"unix://{tmp_path}/meet")
    launch = DwdpLaunch(
        config=DwdpConfig(group_size=2, join_timeout_s=600.0),
        ranks=RankSpan(3, 1, 4),
        endpoint=endpoint,
    )
    reason = admission._Reason(launch)
    assert reason() == "rank 3 starts"
    member = Membership(
        endpoint,
        group=1,
        dwdp_rank=1,
        group_size=2,
        fingerprint=fingerprint(),
        join_timeout_s=0.3,
    )
    member.start()
    reason._asked_at = 0.0
    assert reason() == "rank 3 loads its experts"
    with pytest.raises(TimeoutError):
        member.meet()
    reason._asked_at = 0.0
    assert reason().startswith("rank 3 waits for ranks [0] to publish their experts (")
    member.status_provider = lambda: {"state": "serving"}
    reason._asked_at = 0.0
    assert reason() == "rank 3 has its experts and warms up"
    member.close()


def test_it_acts_only_when_chosen(bound: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("front_end")
    module.setup_server = lambda args: ("address", bound)  # type: ignore[attr-defined]
    monkeypatch.setitem(admission.sys.modules, "front_end", module)
    monkeypatch.setattr(admission, "SERVER_MODULES", ("front_end", "absent"))
    admission.install(lambda args: args.dwdp)
    for chosen, tls, rust in ((False, None, False), (True, "key.pem", False), (True, None, True)):
        monkeypatch.setattr(admission, "_has_rust_front_end", lambda rust=rust: rust)
        args = Namespace(dwdp=chosen, ssl_keyfile=tls)
        assert module.setup_server(args) == ("address", bound)
        assert admission._holder is None
    monkeypatch.setattr(admission, "_has_rust_front_end", lambda: False)
    module.setup_server(Namespace(dwdp=True, ssl_keyfile=None))
    assert ask(bound, "/health")[1]["reason"] == "the server reads its configuration"
    admission.release()
    admission.release()
    assert admission._holder is None

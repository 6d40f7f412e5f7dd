"""The router that launch starts, and how it and its ranks are asked."""

import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.unit.entrypoints.launch.children import poll_until, poll_while
from tests.unit.entrypoints.launch.fakes import PYTHON, launched, plan
from tests.unit.entrypoints.launch.servers import healthy_server
from vllm_dwdp.entrypoints.launch import child, fronts
from vllm_dwdp.entrypoints.launch.ports import free_ports

pytestmark = pytest.mark.timeout(60)


def test_a_port_that_speaks_no_http_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/health"
        talker = subprocess.Popen(
            [*PYTHON, "-c", SSH_SERVER], stdin=listener, stdout=subprocess.DEVNULL
        )
        try:
            assert not fronts.answers(url)
        finally:
            talker.kill()
            talker.wait()


SSH_SERVER = """
import socket
server = socket.socket(fileno=0)
while True:
    connection, _ = server.accept()
    connection.sendall(b"SSH-2.0-OpenSSH_9.2\\r\\n")
    connection.recv(1000)
    connection.close()
"""


def test_the_router_does_not_ask_a_proxy_for_our_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real one."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "10.1.2.3")
    monkeypatch.delenv("no_proxy", raising=False)
    with healthy_server() as first, healthy_server() as second:
        (port,) = free_ports(1)
        router = fronts.router_child(plan(port=port, rank_ports=(first, second)), tmp_path)
        assert router.environment["no_proxy"] == "10.1.2.3,127.0.0.1,localhost"
        try:
            poll_until(router, "serving")
        finally:
            router.ask_to_end()
            router.stop()


def test_a_router_that_waits_for_ranks_says_so_and_can_be_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real one: until its ranks are healthy it neither listens nor hears SIGINT."""
    monkeypatch.setattr(child, "QUIET_S", 0.5)
    port, *rank_ports = free_ports(3)
    router = fronts.router_child(plan(port=port, rank_ports=tuple(rank_ports)), tmp_path)
    try:
        poll_while(router, lambda: "to become healthy" not in router.doing)
        assert router.doing.startswith("last wrote: ")
    finally:
        began = time.monotonic()
        router.ask_to_end()
        router.stop()
    assert time.monotonic() - began < 15


def test_a_proxy_is_not_asked_for_our_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with launched(tmp_path):  # which returns when all serve
        pass

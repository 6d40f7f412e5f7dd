"""Ranks that meet over TCP: authenticated on both sides, on named addresses only."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.multiprocess.members import rank
from tests.multiprocess.tcp_places import FABRIC, base_port, meet_all, publish, secret_file
from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.status import query_status
from vllm_dwdp.distributed.tcp import TcpEndpoint
from vllm_dwdp.errors import (
    DwdpConfigError,
    JoinTimeoutError,
    RendezvousError,
    SecretMismatchError,
)

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("nothing_leaks"),
]


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    text = f"tcp://127.0.0.1:{base_port()}"
    return parse_endpoint(text, group_size=2, secret_file=secret_file(tmp_path))


def test_fabric_handles_are_exchanged_and_a_rank_returns(endpoint: Endpoint) -> None:
    members = [rank(endpoint, number) for number in range(2)]
    for member in members:
        publish(member)
    assert meet_all(members) == [{1: tuple(FABRIC)}, {0: tuple(FABRIC)}]
    assert members[0].peers()[1].state == "ready"
    members[1].close()
    assert members[0].peers()[1].state == "dead"
    assert members[0].status()["last_failure"] == "rank 1 died: it no longer listens"
    returned = rank(endpoint, 1)
    own = next(returned.recover())
    assert own.fabric_handles == tuple(FABRIC) and own.digest == b"digest"
    returned.close()
    members[0].close()


def test_a_rank_that_serves_asks_no_name_server(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would answer nobody meanwhile, and a name server may take longer than any look."""
    members = [rank(endpoint, number) for number in range(2)]
    for member in members:
        publish(member)
    meet_all(members)

    def slow(*_: object, **__: object) -> None:
        raise AssertionError("a name was looked up")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    assert members[0].peers()[1].state == "ready"
    members[1].close()
    assert members[0].peers()[1].state == "dead"
    members[0].close()


def test_a_port_beyond_the_last_is_refused(tmp_path: Path) -> None:
    """The kernel would take it for another one."""
    secret = secret_file(tmp_path)
    with pytest.raises(
        DwdpConfigError, match=r"rank 1 of group 0 port 65536, and 65535 is the hig"
    ):
        parse_endpoint("tcp://127.0.0.1:65535", group_size=2, secret_file=secret)
    second_group = parse_endpoint("tcp://127.0.0.1:65534", group_size=2, secret_file=secret)
    with pytest.raises(DwdpConfigError, match="rank 0 of group 1 port 65536"):
        second_group.listen(1, 0)


def test_descriptors_alone_cannot_be_published(endpoint: Endpoint) -> None:
    with rank(endpoint, 0) as member:
        page = os.memfd_create("page")
        with pytest.raises(RendezvousError, match="no CUDA fabric handles"):
            member.publish([page], [4096])
        os.close(page)


def test_another_secret_is_refused_on_both_sides(endpoint: Endpoint, tmp_path: Path) -> None:
    wrong = secret_file(tmp_path, "fedcba9876543210")
    mistaken = parse_endpoint(str(endpoint), 2, wrong)
    for right, other in ((endpoint, mistaken), (mistaken, endpoint)):
        with rank(right, 0) as member:
            with pytest.raises(SecretMismatchError, match="must have the same content on every"):
                rank(other, 1)
            with pytest.raises(SecretMismatchError):
                query_status(other, 0, 0, timeout_s=5)
            assert query_status(right, 0, 0, timeout_s=5)["dropped_connections"] >= 1
            assert member.peers()[1].state == "missing"


def test_a_stranger_on_a_peers_port_is_named_at_the_deadline(endpoint: Endpoint) -> None:
    assert isinstance(endpoint, TcpEndpoint)
    stranger = socket.create_server(endpoint.address(0, 1))
    with ThreadPoolExecutor(1) as pool, rank(endpoint, 0, join_timeout_s=0.5) as member:
        pool.submit(speak_smtp, stranger)
        publish(member)
        with pytest.raises(
            JoinTimeoutError, match="exchange with rank 1 failed.* there is no rank"
        ):
            member.meet()
    stranger.close()


def speak_smtp(listener: socket.socket) -> None:
    listener.settimeout(1.0)
    try:
        while True:
            connection, _ = listener.accept()
            connection.sendall(b"220 mail.example.org ESMTP ready, what do you want of me?\r\n")
            connection.close()
    except TimeoutError:
        return


def test_one_rank_cannot_run_twice(endpoint: Endpoint) -> None:
    with (
        rank(endpoint, 0),
        pytest.raises(RendezvousError, match="rank 0 of group 0 is already running at 127.0.0.1:"),
    ):
        rank(endpoint, 0)


def test_ranks_listen_at_the_named_address_and_the_derived_port_only(endpoint: Endpoint) -> None:
    assert isinstance(endpoint, TcpEndpoint)
    members = [rank(endpoint, 0), rank(endpoint, 1)]
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", endpoint.port), ("127.0.0.1", endpoint.port + 1)}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", endpoint.port), timeout=1)
    for member in members:
        member.close()


def test_the_rule_of_hosts_and_ports(tmp_path: Path) -> None:
    place = parse_endpoint("tcp://[fd00::1],b:7000", 4, secret_file(tmp_path))
    assert isinstance(place, TcpEndpoint)
    addresses = [place.address(0, rank) for rank in range(4)]
    assert addresses == [("fd00::1", 7000), ("fd00::1", 7001), ("b", 7002), ("b", 7003)]
    assert place.address(2, 3) == ("b", 7000 + 2 * 4 + 3)
    assert str(place) == "tcp://[fd00::1],b:7000"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tcp://host", "is not a meeting place; use tcp://host:port"),
        ("tcp://host:0", "is not a meeting place"),
        ("tcp://host:65536", "is not a meeting place"),
        ("tcp://host:٣", "is not a meeting place"),
        ("tcp://0.0.0.0:7000", "names every address of a host"),
        ("tcp://[::]:7000", "names every address of a host"),
        ("tcp://:7000", "names every address of a host"),
        ("tcp://a,:7000", "names every address of a host"),
        ("tcp://a,b,c:7000", "names 3 hosts for groups of 4"),
    ],
)
def test_what_is_no_place_of_several_hosts(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(DwdpConfigError, match=complaint):
        parse_endpoint(text, 4, secret_file(tmp_path))


def test_an_address_of_another_host_cannot_be_listened_at(tmp_path: Path) -> None:
    place = parse_endpoint("tcp://192.0.2.1:7000", 2, secret_file(tmp_path))
    with pytest.raises(RendezvousError, match="192.0.2.1 must be an address of the host that runs"):
        rank(place, 0)


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [
        (None, 0o600, "cannot be read: .*No such file.*openssl rand -hex 32"),
        ("", 0o600, "holds no bytes; 16 to 4096 are required"),
        ("short", 0o600, "holds 5 bytes"),
        ("x" * 5000, 0o600, "holds more than 4096 bytes"),
        ("0123456789abcdef", 0o644, "has mode 0644: others may read it.* Run chmod 600"),
    ],
)
def test_a_secret_that_is_none(
    content: str | None, mode: int, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_text(content + "\n")
        path.chmod(mode)
    with pytest.raises(DwdpConfigError, match=complaint):
        parse_endpoint("tcp://127.0.0.1:7000", 2, str(path))


def test_a_secret_is_needed_for_tcp_and_refused_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(DwdpConfigError, match="needs rendezvous_secret_file"):
        parse_endpoint("tcp://127.0.0.1:7000", 2)
    with pytest.raises(DwdpConfigError, match="is used by tcp:// only"):
        parse_endpoint(f"unix://{tmp_path}", 2, secret_file(tmp_path))


def test_the_secret_shows_nowhere(endpoint: Endpoint) -> None:
    assert "0123456789abcdef" not in repr(endpoint) + str(endpoint)


def test_bounds_of_a_message_hold_for_both_transports() -> None:
    assert messages.FABRIC_HANDLES_PER_MESSAGE * 70 < messages.MAX_MESSAGE_BYTES

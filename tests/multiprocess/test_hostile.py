"""A rank under attack by a local process, or over TCP: it answers on, and neither grows nor ends.

The rank is a process of its own, so that its memory and descriptors are counted alone.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from tests.multiprocess.tcp_places import base_port, secret_file
from tests.multiprocess.victim import Victim
from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.distributed import messages, server
from vllm_dwdp.distributed.meeting import make_abstract_endpoint, parse_endpoint
from vllm_dwdp.distributed.status import query_status
from vllm_dwdp.distributed.tcp import TcpEndpoint
from vllm_dwdp.errors import RendezvousError, SecretMismatchError

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]


@pytest.fixture(params=["abstract", "unix", "tcp"], scope="module")
def victim(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Victim]:
    folder = tmp_path_factory.mktemp("hostile")
    secret = secret_file(folder) if request.param == "tcp" else None
    places = {
        "abstract": str(make_abstract_endpoint()),
        "unix": f"unix://{folder}/meet",
        "tcp": f"tcp://127.0.0.1:{base_port()}",
    }
    made = Victim(places[request.param], secret)
    yield made
    made.end()


def test_random_bytes(victim: Victim) -> None:
    for round_ in range(4):
        victim.random_attack(500, seed=round_ + 1)
        victim.must_answer()
    victim.must_be_unchanged()


def test_lengths_without_end(victim: Victim) -> None:
    """2**63 raw, and every msgpack header that announces 2**32 - 1 items or bytes."""
    huge = [(2**63).to_bytes(8, "big"), (2**63).to_bytes(8, "little"), b"\xff" * 8]
    huge += [bytes([kind]) + b"\xff" * 4 for kind in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF)]
    hello = messages.encode(messages.Hello(1, 1, fingerprint()))
    huge += [hello[:-1] + bytes([kind]) + b"\xff" * 4 for kind in (0xC6, 0xDB, 0xDD, 0xDF)]
    for data in huge * 20:
        victim.attack(data)
        if victim.is_tcp:
            with victim.endpoint.connect(0, 0, timeout_s=5) as connection:  # type: ignore[union-attr]
                connection.sock.sendall(data)
    victim.must_be_unchanged()


def test_truncated_messages(victim: Victim) -> None:
    hello = messages.encode(messages.Hello(1, time.time_ns(), fingerprint()))
    for length in range(1, len(hello), 3):
        connection = victim.endpoint.connect(0, 0, timeout_s=5)
        assert connection is not None
        with connection:
            connection.send(hello[:length])
            with pytest.raises(ConnectionError):
                connection.receive(0)
    victim.must_be_unchanged()


def test_half_a_conversation_and_then_nothing(victim: Victim) -> None:
    """Slow writers: more of them than the rank keeps connections hold nobody up."""
    slow = [victim.raw() for _ in range(server.MAX_CONNECTIONS + 100)]
    try:
        for connection in slow[::2]:
            if victim.is_tcp:
                with suppress(ConnectionError):
                    connection.sendall(b"DWDP")
        for _ in range(10):
            victim.must_answer()
        victim.must_be_unchanged()
        for connection in slow:
            connection.settimeout(5)
            with suppress(ConnectionError):
                while connection.recv(4096):
                    pass
    finally:
        for connection in slow:
            connection.close()


def test_a_reader_that_does_not_read(victim: Victim) -> None:
    """It asks for a shard of hundreds of handles and leaves the reply in the socket."""
    held = []
    for _ in range(50):
        connection = victim.endpoint.connect(0, 0, timeout_s=5)
        assert connection is not None
        connection.send(messages.encode(messages.Hello(1, 2**62, fingerprint())))
        held.append(connection)
    victim.must_answer()
    for connection in held:
        connection.close()
    victim.must_be_unchanged()


def test_descriptors_that_nobody_asked_for(victim: Victim) -> None:
    if victim.is_tcp:
        pytest.skip("descriptors cannot travel over TCP")
    for data in (b"\x00", messages.encode(messages.StatusRequest())):
        for _ in range(20):
            victim.attack(data, num_fds=250)
    victim.must_be_unchanged()


def test_a_message_of_another_kind(victim: Victim) -> None:
    """Replies instead of requests, values out of range, a rank that does not exist."""
    strange: list[object] = [
        messages.Accepted(),
        messages.Handles(3, ()),
        messages.Hello(-5, -(2**63), fingerprint()),
        messages.Hello(7, 1, fingerprint(model="\x00" * 60_000)),
        messages.Hello(1, 1, fingerprint(dtype="\x01" * 60_000)),
        messages.Borrow(1, 2**62, fingerprint(), -1),
        messages.Failed(1, 2**62, "\x02" * 60_000),
    ]
    for message in strange:
        connection = victim.endpoint.connect(0, 0, timeout_s=5)
        assert connection is not None
        with connection, suppress(ConnectionError):
            connection.send(msgspec.msgpack.encode(message))
            received = connection.receive(0)
            assert received is not None
            reply = messages.decode_reply(received[0])
            assert not isinstance(reply, messages.Shard)
    victim.must_be_unchanged()


def test_ten_thousand_connections(victim: Victim) -> None:
    crowd = []
    for number in range(10_000):
        with suppress(OSError):
            if isinstance(victim.endpoint, TcpEndpoint):
                sock = socket.socket()
                sock.setblocking(False)
                sock.connect_ex(victim.endpoint.address(0, 0))
            else:
                connection = victim.endpoint.connect(0, 0, timeout_s=0.0)
                if connection is None:
                    continue
                sock = connection.sock
            crowd.append(sock)
        if len(crowd) >= 4000:
            for sock in crowd:
                sock.close()
            crowd.clear()
        if number % 2500 == 0:
            with suppress(OSError, RendezvousError):
                query_status(victim.endpoint, 0, 0, timeout_s=1)
    for sock in crowd:
        sock.close()
    deadline = time.monotonic() + 10
    while True:
        with suppress(OSError, RendezvousError):
            query_status(victim.endpoint, 0, 0, timeout_s=2)
            break
        assert time.monotonic() < deadline
    victim.must_be_unchanged()


def test_many_with_a_wrong_secret(victim: Victim, tmp_path: Path) -> None:
    if not victim.is_tcp:
        pytest.skip("only TCP has a secret")
    wrong = parse_endpoint(str(victim.endpoint), 2, secret_file(tmp_path, "fedcba9876543210"))
    for _ in range(300):
        with pytest.raises(SecretMismatchError, match="refused this rank's secret"):
            wrong.connect(0, 0, timeout_s=5)
    victim.must_be_unchanged()


def test_a_recorded_conversation_is_worth_nothing(victim: Victim) -> None:
    """Every byte that an honest dialler sent, again, on a new connection."""
    if not victim.is_tcp:
        pytest.skip("who can listen in on a Unix socket is root or the same user")
    sent: list[bytes] = []

    class Recorder:
        """A socket that notes what is sent."""

        def __init__(self, connection: socket.socket) -> None:
            self.recv, self.close, self._send = connection.recv, connection.close, connection.send
            self.settimeout = connection.settimeout

        def send(self, data: bytearray) -> int:
            count = self._send(data)
            sent.append(bytes(data[:count]))
            return count

    connection = victim.endpoint.connect(0, 0, timeout_s=5)
    assert connection is not None
    connection.sock = Recorder(connection.sock)  # type: ignore[assignment]
    connection.send(messages.encode(messages.Hello(1, 2**62, fingerprint())))
    received = connection.receive(0)
    assert received is not None
    connection.close()
    assert isinstance(messages.decode_reply(received[0]), messages.Shard)
    honest = victim.raw()
    greeting = honest.recv(40)
    honest.close()
    with victim.raw() as connection:
        assert connection.recv(40) != greeting, "a nonce came twice"
        connection.sendall(os.urandom(40) + b"".join(sent))
        answer = b""
        with suppress(ConnectionError):
            while data := connection.recv(4096):
                answer += data
        assert not answer.strip(b"\0"), "it answered"
    victim.must_be_unchanged()

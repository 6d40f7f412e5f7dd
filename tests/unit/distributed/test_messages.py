"""The wire: what is no message is refused, and no descriptor leaks."""

import os
import resource
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.files import num_open_files
from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.connection import PacketConnection
from vllm_dwdp.distributed.fingerprint import Fingerprint
from vllm_dwdp.errors import ProtocolError, RendezvousError


def fingerprint(**changes: object) -> Fingerprint:
    facts: dict[str, object] = {
        "model": "/m",
        "revision": "None",
        "checkpoint_digest": "c",
        "config_digest": "d",
        "dtype": "bf16",
        "quantization": "None",
        "group_size": 2,
        "experts_per_rank": 0,
        "tensor_slice": "0 of 1",
        "page_bytes": 4096,
        "vllm_version": "0.32.0",
        "plugin_version": "0.1.0",
    }
    return Fingerprint(**(facts | changes))  # type: ignore[arg-type]


Pair = tuple[PacketConnection, PacketConnection]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with PacketConnection(left) as ours, PacketConnection(right) as theirs:
        yield ours, theirs


def test_a_message_and_its_descriptor_arrive(pair: Pair) -> None:
    handles = messages.Handles(1, (b"f" * messages.FABRIC_HANDLE_BYTES,))
    fd = os.memfd_create("dwdp-test")
    pair[0].send_message(handles, (fd,))
    received, fds = pair[1].receive_reply()
    assert received == handles
    assert len(fds) == 1
    assert os.fstat(fds[0]).st_ino == os.fstat(fd).st_ino
    assert not os.get_inheritable(fds[0])
    for owned in (fd, *fds):
        os.close(owned)


def test_nonsense_is_refused_and_its_descriptors_are_closed(
    pair: Pair,
) -> None:
    fd = os.memfd_create("dwdp-test")
    before = num_open_files()
    for nonsense in (b"\xc1", b"x" * 1000, b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"):
        for fds in ([], [fd, fd, fd]):
            pair[0].send(nonsense, fds)
            with pytest.raises(ProtocolError):
                pair[1].receive_reply()
    pair[0].send_message(messages.StatusRequest(), [fd])
    with pytest.raises(ProtocolError, match="0 file descriptors"):
        pair[1].receive_request()
    assert num_open_files() == before
    os.close(fd)


HEADER = messages.Shard(1, 7, (4096,), b"l" * 32, b"d" * 32, True, 600, 1500)
FABRIC = [number.to_bytes(messages.FABRIC_HANDLE_BYTES, "big") for number in range(1500)]


def test_a_shard_of_many_handles_arrives_in_order(
    pair: Pair,
) -> None:
    """600 descriptors are three messages, 1500 fabric handles two; each keeps its place."""
    fds = [os.memfd_create(f"dwdp-{number}") for number in range(600)]
    packets = list(messages.shard_packets(HEADER, fds, FABRIC))
    assert len(packets) == 1 + 3 + 2
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(lambda: [pair[0].send_message(*packet) for packet in packets])
        header, stray = pair[1].receive_reply()
        assert header == HEADER and not stray
        received, fabric = pair[1].receive_handles(HEADER)
        sending.result()
    assert [os.fstat(fd).st_ino for fd in received] == [os.fstat(fd).st_ino for fd in fds]
    assert fabric == FABRIC
    messages.close_all([*fds, *received])


BAD_HANDLES = {
    "another message": [(messages.NotYet(), 0)],
    "nothing in it": [(messages.Handles(0, ()), 0)],
    "miscounted": [(messages.Handles(100, ()), 100), (messages.Handles(100, ()), 99)],
    "too many": [(messages.Handles(250, ()), 250)] * 2
    + [(messages.Handles(101, FABRIC[:750] * 2), 101)],
    "cut short": [(messages.Handles(250, ()), 250)],
}


@pytest.mark.parametrize("name", BAD_HANDLES)
def test_handles_that_do_not_fit_their_shard_are_refused_and_closed(pair: Pair, name: str) -> None:
    fd = os.memfd_create("dwdp-test")
    before = num_open_files()
    for message, num_fds in BAD_HANDLES[name]:
        data = msgspec.msgpack.encode(message)
        pair[0].sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * messages.MAX_MESSAGE_BYTES)
        pair[0].send(data, [fd] * num_fds)
    pair[0].sock.shutdown(socket.SHUT_WR)
    with pytest.raises((ProtocolError, ConnectionResetError)):
        pair[1].receive_handles(HEADER)
    assert num_open_files() == before
    os.close(fd)


def test_descriptors_beyond_the_limit_of_open_files_are_a_clear_error(
    pair: Pair,
) -> None:
    fd = os.memfd_create("dwdp-test")
    open_now = num_open_files()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for packet in messages.shard_packets(HEADER, [fd] * 600, []):
        pair[0].send_message(*packet)
    pair[1].receive_reply()
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 300, hard))
    try:
        with pytest.raises(RendezvousError, match=r"RLIMIT_NOFILE\)\. Raise it"):
            pair[1].receive_handles(HEADER)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert num_open_files() == open_now
    os.close(fd)


@pytest.mark.parametrize(
    "changes", [{"num_fds": 8193}, {"num_fabric_handles": 8193}, {"num_fds": -1}]
)
def test_a_shard_of_too_many_handles_is_no_message(changes: dict[str, int]) -> None:
    shard = msgspec.structs.replace(HEADER, **changes)
    with pytest.raises(ProtocolError, match="no message"):
        messages.decode_reply(messages.encode(shard))
    short = messages.Handles(0, (b"f" * 63,))
    with pytest.raises(ProtocolError, match="no message"):
        messages.decode_reply(messages.encode(short))


def test_a_message_too_long_is_refused(pair: Pair) -> None:
    pair[0].sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * messages.MAX_MESSAGE_BYTES)
    pair[0].send(b"x" * (messages.MAX_MESSAGE_BYTES + 1))
    with pytest.raises(ProtocolError, match="more than 131072 bytes"):
        pair[1].receive_request()


@settings(max_examples=500)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    for decode in (messages.decode_request, messages.decode_reply):
        try:
            decode(data)
        except ProtocolError:
            continue


def test_nesting_without_end_is_a_protocol_error() -> None:
    """A dictionary in a status may nest; 100,000 levels must not exhaust the stack."""
    status = messages.encode(messages.Status({"a": 1}))
    nested = status[:-1] + b"\x91" * 100_000 + b"\x01"
    with pytest.raises(ProtocolError, match="no message"):
        messages.decode_reply(nested)


def test_where_equal_content_came_from_may_differ_and_nothing_else() -> None:
    ours = fingerprint()
    assert ours.differences(fingerprint(model="/elsewhere", revision="v2")) == {}
    for name in ours.__struct_fields__:
        if name not in ("model", "revision"):
            value = 99 if isinstance(getattr(ours, name), int) else "other"
            assert set(ours.differences(fingerprint(**{name: value}))) == {name}

"""The wire: what is no message is refused, and no descriptor leaks."""

import os
import socket
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.fingerprint import Fingerprint
from vllm_dwdp.errors import ProtocolError


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
        "page_bytes": 4096,
        "vllm_version": "0.32.0",
        "plugin_version": "0.1.0",
    }
    return Fingerprint(**(facts | changes))  # type: ignore[arg-type]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield left, right
    left.close()
    right.close()


def test_a_message_and_its_descriptor_arrive(pair: tuple[socket.socket, socket.socket]) -> None:
    shard = messages.Shard(1, 7, 4096, b"d" * 32, True)
    fd = os.memfd_create("dwdp-test")
    messages.send(pair[0], shard, (fd,))
    received, fds = messages.receive_reply(pair[1])
    assert received == shard
    assert len(fds) == 1
    assert os.fstat(fds[0]).st_ino == os.fstat(fd).st_ino
    assert not os.get_inheritable(fds[0])
    for owned in (fd, *fds):
        os.close(owned)


def test_nonsense_is_refused_and_its_descriptors_are_closed(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    fd = os.memfd_create("dwdp-test")
    before = len(os.listdir("/proc/self/fd"))
    for nonsense in (b"\xc1", b"x" * 1000, b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"):
        socket.send_fds(pair[0], [nonsense], [fd, fd, fd])
        with pytest.raises(ProtocolError):
            messages.receive_request(pair[1])
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)


def test_a_message_too_long_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * messages.MAX_MESSAGE_BYTES)
    pair[0].send(b"x" * (messages.MAX_MESSAGE_BYTES + 1))
    with pytest.raises(ProtocolError, match="more than 131072 bytes"):
        messages.receive_request(pair[1])


@settings(max_examples=500)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_decode_error(data: bytes) -> None:
    for decoder in (messages._requests, messages._replies):
        try:
            decoder.decode(data)
        except msgspec.DecodeError:
            continue


def test_the_path_of_the_model_may_differ_and_nothing_else() -> None:
    ours = fingerprint()
    assert ours.differences(fingerprint(model="/elsewhere")) == {}
    for name in ours.__struct_fields__:
        if name != "model":
            value = 99 if isinstance(getattr(ours, name), int) else "other"
            assert set(ours.differences(fingerprint(**{name: value}))) == {name}

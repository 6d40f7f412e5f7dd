"""What ranks say to each other: one request and one reply per connection, msgpack, bounded.

Never pickle: a peer's bytes are data. File descriptors travel beside the reply (SCM_RIGHTS), so
that neither ptrace nor a common PID namespace is needed.
"""

import os
import socket
from typing import Any

import msgspec

from vllm_dwdp.distributed.fingerprint import Fingerprint
from vllm_dwdp.errors import ProtocolError

MAX_MESSAGE_BYTES = 128 * 1024
MAX_FDS = 1


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A peer introduces itself and asks for our shard.

    `generation` grows with every start of a rank; an older one than we have seen is stale.
    """

    dwdp_rank: int
    generation: int
    fingerprint: Fingerprint


class Borrow(msgspec.Struct, frozen=True, tag=True):
    """A peer asks for the shard of rank `wanted`, which does not answer (or is itself, restarted)."""

    dwdp_rank: int
    generation: int
    fingerprint: Fingerprint
    wanted: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A peer gives up its start, and says why."""

    dwdp_rank: int
    generation: int
    reason: str


class StatusRequest(msgspec.Struct, frozen=True, tag=True):
    """How are you?"""


class NotYet(msgspec.Struct, frozen=True, tag=True):
    """We do not have that shard (yet)."""


class Shard(msgspec.Struct, frozen=True, tag=True):
    """A shard, ours or one that we hold; its read-only fd travels with the message.

    `ready` is true once its edge pages are whole; `digest` covers all of it then, and is empty before.
    """

    dwdp_rank: int
    generation: int
    num_bytes: int
    digest: bytes
    ready: bool


class Refused(msgspec.Struct, frozen=True, tag=True):
    """We do not talk to you; `reason` is an error text."""

    reason: str


class Status(msgspec.Struct, frozen=True, tag=True):
    """Our status, a JSON-compatible dictionary."""

    content: dict[str, Any]


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Noted."""


Request = Hello | Borrow | Failed | StatusRequest
Reply = NotYet | Shard | Refused | Status | Accepted

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)


def send(connection: socket.socket, message: Request | Reply, fds: tuple[int, ...] = ()) -> None:
    """Send one message and, with it, copies of `fds`."""
    data = _encoder.encode(message)
    assert len(data) <= MAX_MESSAGE_BYTES, f"{type(message).__name__} of {len(data)} bytes"
    if fds:
        socket.send_fds(connection, [data], list(fds))
    else:
        connection.send(data)


def receive_request(connection: socket.socket) -> tuple[Request, list[int]]:
    """One request and the fds that came with it, owned by the caller.

    Raises:
        ProtocolError: it is too long, truncated or not a request; its fds are closed.
    """
    return _receive(connection, _requests)


def receive_reply(connection: socket.socket) -> tuple[Reply, list[int]]:
    """As `receive_request`, for replies."""
    return _receive(connection, _replies)


def _receive(connection: socket.socket, decoder: Any) -> tuple[Any, list[int]]:
    data, fds, flags, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, MAX_FDS)
    if not data and not fds:
        raise ConnectionResetError("the peer hung up")
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError(
                f"a peer sent more than {MAX_MESSAGE_BYTES} bytes or {MAX_FDS} file descriptors"
            )
        for fd in fds:
            os.set_inheritable(fd, False)
        return decoder.decode(data), list(fds)
    except (msgspec.DecodeError, ProtocolError) as error:
        for fd in fds:
            os.close(fd)
        if isinstance(error, ProtocolError):
            raise
        raise ProtocolError(
            f"a peer sent {len(data)} bytes that are no message: {error}"
        ) from error

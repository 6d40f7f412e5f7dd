"""What ranks say to each other: one request and its reply per connection, msgpack, bounded.

A shard is a sequence of handles: file descriptors, which travel beside a message (SCM_RIGHTS), so
that neither ptrace nor a common PID namespace is needed; or CUDA fabric handles, opaque bytes inside
it. A `Shard` says how many follow; they come in as many `Handles` as they need.

Never pickle: a peer's bytes are data.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Annotated, Any

import msgspec

from vllm_dwdp.distributed.fingerprint import Fingerprint
from vllm_dwdp.errors import ProtocolError

MAX_MESSAGE_BYTES = 128 * 1024
MAX_HANDLES = 8192
FDS_PER_MESSAGE = 250
FABRIC_HANDLES_PER_MESSAGE = 1024
FABRIC_HANDLE_BYTES = 64

_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_HANDLES)]
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Generation = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_FabricHandle = Annotated[
    bytes, msgspec.Meta(min_length=FABRIC_HANDLE_BYTES, max_length=FABRIC_HANDLE_BYTES)
]


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A peer introduces itself and asks for our shard.

    `generation` grows with every start of a rank; an older one than we have seen is stale. Without
    `wants_handles` the peer only asks how far the shard is.
    """

    dwdp_rank: int
    generation: _Generation
    fingerprint: Fingerprint
    wants_handles: bool = True


class Borrow(msgspec.Struct, frozen=True, tag=True):
    """A peer asks for the shard of rank `wanted`, which does not answer (or is itself, restarted)."""

    dwdp_rank: int
    generation: _Generation
    fingerprint: Fingerprint
    wanted: int
    wants_handles: bool = True


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A peer gives up its start, and says why."""

    dwdp_rank: int
    generation: _Generation
    reason: str


class Keep(msgspec.Struct, frozen=True, tag=True):
    """A holder asks for our shard once it is whole; it has the one of generation `have`, or none (0)."""

    have: _Generation


class Follow(msgspec.Struct, frozen=True, tag=True):
    """A peer asks how far we are with new weights."""

    dwdp_rank: int


class Renewed(msgspec.Struct, frozen=True, tag=True):
    """A rank that starts asks which checkpoint we serve, if we have read it since we started."""


class StatusRequest(msgspec.Struct, frozen=True, tag=True):
    """A process asks how this rank is."""


class NotYet(msgspec.Struct, frozen=True, tag=True):
    """We do not have that shard (yet)."""


class Shard(msgspec.Struct, frozen=True, tag=True):
    """A shard, ours or one that we hold; its handles follow.

    `handle_bytes` are the bytes behind each handle; `layout` tells what lies in them, on every rank.
    `ready` is true once its edge pages are whole; `digest` covers all of it then, and is empty before.
    `direct_limit` is the most tokens of a step that reads in place, as the rank proposes it with
    `ready`, and the group's once `limit_in_force`; None of a rank that has no choice. `update` is the
    number of the last update of weights that the shard has seen.
    """

    dwdp_rank: int
    generation: _Generation
    handle_bytes: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_HANDLES)]
    layout: bytes
    digest: bytes
    ready: bool
    num_fds: _Count
    num_fabric_handles: _Count
    direct_limit: _Tokens | None = None
    limit_in_force: bool = False
    update: _Generation = 0


class Identity(msgspec.Struct, frozen=True, tag=True):
    """What we serve: for a rank that starts, and for a holder, whom our shard follows."""

    fingerprint: Fingerprint


class Step(IntEnum):
    """How far a rank is with new weights (`weight_agreement`)."""

    UNABLE = -1
    """All ranks had paused, and one of them cannot take the new weights; none wrote."""
    WITHDRAWN = 0
    """It has given up before any rank wrote."""
    PAUSED = 1
    """It runs no forward."""
    LOCKED = 2
    """It has seen all ranks pause, and stays so until the end."""
    WRITTEN = 3
    """Its resident experts and its replicated tensors are new."""
    WHOLE = 4
    """So is all of its shard."""
    DONE = 5
    """It serves."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """How far we are with new weights, in our start of number `started`.

    `proof` is a digest of the weights and their layout, once they are written; of a rank that is unable,
    the starts of all ranks that had paused. `generation` and `digest`
    are those of our shard, once it is whole. `failure` is why it cannot become whole any more.
    """

    started: _Generation
    update: _Generation
    step: Step
    proof: bytes = b""
    generation: _Generation = 0
    digest: bytes = b""
    failure: str = ""

    @property
    def unsettled(self) -> str:
        """Why it cannot be known which weights the group serves; empty if they are whole."""
        if self.failure:
            return self.failure
        if Step.LOCKED <= self.step < Step.DONE:
            return "the ranks of this group are writing new weights. Start again when they have"
        return ""


class Handles(msgspec.Struct, frozen=True, tag=True):
    """The next handles of a shard: `num_fds` descriptors beside this message, and these."""

    num_fds: Annotated[int, msgspec.Meta(ge=0, le=FDS_PER_MESSAGE)]
    fabric_handles: Annotated[
        tuple[_FabricHandle, ...], msgspec.Meta(max_length=FABRIC_HANDLES_PER_MESSAGE)
    ]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """We do not talk to you; `reason` is an error text.

    `seen_generation` is that of a later start of your rank, if that is why; else 0.
    """

    reason: str
    seen_generation: _Generation = 0


class Status(msgspec.Struct, frozen=True, tag=True):
    """Our status, a JSON-compatible dictionary."""

    content: dict[str, Any]


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Noted."""


Request = Hello | Borrow | Failed | Keep | Follow | Renewed | StatusRequest
Reply = NotYet | Identity | Shard | Progress | Handles | Refused | Status | Accepted
Packet = tuple[Reply, tuple[int, ...]]
"""A message and the descriptors to send beside it."""

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def shard_packets(
    header: Shard, fds: Sequence[int], fabric_handles: Sequence[bytes]
) -> Iterator[Packet]:
    """Yield a shard as messages; `fds` stay the caller's and must stay open until they are sent."""
    yield header, ()
    for start in range(0, len(fds), FDS_PER_MESSAGE):
        batch = tuple(fds[start : start + FDS_PER_MESSAGE])
        yield Handles(len(batch), ()), batch
    for start in range(0, len(fabric_handles), FABRIC_HANDLES_PER_MESSAGE):
        yield Handles(0, tuple(fabric_handles[start : start + FABRIC_HANDLES_PER_MESSAGE])), ()


def encode(message: Request | Reply) -> bytes:
    """Return the bytes of a message."""
    data = _encoder.encode(message)
    assert len(data) <= MAX_MESSAGE_BYTES, f"{type(message).__name__} of {len(data)} bytes"
    return data


def decode_request(data: bytes) -> Request:
    """Return the request in `data`.

    Raises:
        ProtocolError: it is none.
    """
    with _decoding(data):
        return _requests.decode(data)


def decode_reply(data: bytes) -> Reply:
    """As `decode_request`, for replies."""
    with _decoding(data):
        return _replies.decode(data)


def collect_handles(
    header: Shard, receive: Callable[[], tuple[Reply, list[int]]]
) -> tuple[list[int], list[bytes]]:
    """Return the handles that follow `header`; the caller owns the descriptors.

    Args:
        receive: the next reply and the descriptors that came with it.

    Raises:
        ProtocolError: something else follows. Whatever is raised, all descriptors are closed.
    """
    fds: list[int] = []
    fabric_handles: list[bytes] = []
    try:
        while len(fds) < header.num_fds or len(fabric_handles) < header.num_fabric_handles:
            reply, batch = receive()
            fds += batch
            if not isinstance(reply, Handles) or not (reply.num_fds or reply.fabric_handles):
                raise ProtocolError(f"a peer sent {type(reply).__name__} among a shard's handles")
            if reply.num_fds != len(batch):
                raise ProtocolError(
                    f"a peer sent {len(batch)} descriptors with a message that counts {reply.num_fds}"
                )
            fabric_handles += reply.fabric_handles
        if len(fds) > header.num_fds or len(fabric_handles) > header.num_fabric_handles:
            raise ProtocolError("a peer sent more handles than its shard has")
    except BaseException:
        close_all(fds)
        raise
    return fds, fabric_handles


def close_all(fds: Sequence[int]) -> None:
    """Close every descriptor of `fds`."""
    for fd in fds:
        os.close(fd)


@contextmanager
def _decoding(data: bytes) -> Iterator[None]:
    try:
        yield
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"a peer sent {len(data)} bytes that are no message: {error}"
        ) from error

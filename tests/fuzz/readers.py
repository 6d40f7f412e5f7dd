"""All that a rank reads from others, each as a function of bytes, and real messages to start from.

The first byte of an input picks the reader, the rest is what a peer sends. Anything but the named
errors is a finding.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.group_state import GroupState
from vllm_dwdp.distributed.held_shards import HeldShards
from vllm_dwdp.distributed.published_shard import PublishedShard
from vllm_dwdp.distributed.secure import SecureChannel
from vllm_dwdp.errors import RendezvousError

SECRET = b"a secret of some length"
HEADER = messages.Shard(1, 7, (4096,) * 40, b"l" * 32, b"d" * 32, True, 0, 40)


SHARD = PublishedShard(
    rank=0,
    generation=1,
    fds=(),
    fabric_handles=(b"f" * 64,) * 3,
    handle_bytes=(4096,) * 3,
    layout=b"",
    digest=b"",
    ready=False,
)


def make_state() -> GroupState:
    """Return what a rank of three answers from, once it has published its shard."""
    state = GroupState(0, 3, fingerprint())
    state.publish(SHARD)
    state.announce_ready(b"digest")
    return state


def make_held() -> HeldShards:
    """Return what a holder answers from, once it has that shard."""
    held = HeldShards(0)
    held.hold(SHARD, fingerprint())
    return held


def read_request(data: bytes) -> None:
    """Read a request, and its answer, which must be sendable."""
    request = messages.decode_request(data)
    if isinstance(request, messages.StatusRequest):
        return
    if isinstance(request, messages.Keep):
        packets = STATE.answer_holder(request)
    elif isinstance(request, messages.Renewed):
        packets = [(STATE.answer_newcomer(), ())]
    elif isinstance(request, messages.Follow):
        packets = [(STATE.progress(), ())]
    else:
        packets = STATE.answer(request)
    if isinstance(request, messages.Borrow):
        packets += HELD.lend(request)
    for packet, _ in packets:
        messages.decode_reply(messages.encode(packet))


def read_reply(data: bytes) -> None:
    """Read a reply."""
    messages.decode_reply(data)


def read_handles(data: bytes) -> None:
    """Read the messages that follow a shard, each after its length."""
    rest = data

    def receive() -> tuple[messages.Reply, list[int]]:
        nonlocal rest
        if not rest:
            raise ConnectionResetError
        length, rest = rest[0] * 16, rest[1:]
        message, rest = rest[:length], rest[length:]
        return messages.decode_reply(message), []

    _, handles = messages.collect_handles(HEADER, receive)
    assert len(handles) == HEADER.num_fabric_handles


def read_handshake(data: bytes) -> None:
    """Send bytes before the secret is proved; none of them may be taken for a message."""
    feed(SecureChannel(SECRET, b"rank 0", listens=True, max_bytes=4096), data)
    feed(SecureChannel(SECRET, b"rank 0", listens=False, max_bytes=4096), data)


def read_frames(data: bytes) -> None:
    """Send bytes afterwards, as somebody in between who does not know the secret."""
    listener = SecureChannel(SECRET, b"rank 0", listens=True, max_bytes=4096)
    dialler = SecureChannel(SECRET, b"rank 0", listens=False, max_bytes=4096)
    for source, target in ((listener, dialler), (dialler, listener), (listener, dialler)):
        target_takes = bytes(source.outgoing)
        source.outgoing.clear()
        feed(target, target_takes)
    assert listener.is_open
    feed(listener, data)


def feed(channel: SecureChannel, data: bytes) -> None:
    """Everything, in the portions that the channel wants."""
    while data:
        wanted = channel.num_wanted
        assert 0 < wanted <= 4096 + 32
        assert channel.feed(data[:wanted]) is None, "something forged was taken for a message"
        data = data[wanted:]


STATE = make_state()
HELD = make_held()
READERS: list[Callable[[bytes], None]] = [
    read_request,
    read_reply,
    read_handles,
    read_handshake,
    read_frames,
]


def fuzz(data: bytes) -> None:
    """One input."""
    if not data:
        return
    with suppress(RendezvousError, ConnectionResetError):
        READERS[data[0] % len(READERS)](data[1:])


def write_corpus(folder: Path) -> None:
    """Real messages to start from, for every reader."""
    real: list[messages.Request | messages.Reply] = [
        messages.Hello(1, 1, fingerprint()),
        messages.Hello(1, 1, fingerprint(dtype="fp16")),
        messages.Borrow(2, 1, fingerprint(), 1),
        messages.Failed(1, 1, "reason"),
        messages.Keep(1),
        messages.Follow(1),
        messages.Renewed(),
        messages.StatusRequest(),
        messages.NotYet(),
        messages.Identity(fingerprint()),
        HEADER,
        messages.Progress(1, 2, 3, b"proof", 4, b"digest", "failure"),
        messages.Handles(0, (b"f" * 64,) * 3),
        messages.Refused("reason"),
        messages.Status({"a": [1, {"b": None}], "c": 1.5}),
        messages.Accepted(),
    ]
    for number, message in enumerate(real):
        data = messages.encode(message)
        for reader in range(2):
            (folder / f"{reader}-{number}").write_bytes(bytes([reader]) + data)
        framed = bytes([-(-len(data) // 16)]) + data
        (folder / f"2-{number}").write_bytes(b"\2" + framed)
    dialler = SecureChannel(SECRET, b"rank 0", listens=False, max_bytes=4096)
    listener = SecureChannel(SECRET, b"rank 0", listens=True, max_bytes=4096)
    (folder / "3-greeting").write_bytes(b"\3" + bytes(listener.outgoing))
    dialler.feed(bytes(listener.outgoing))
    (folder / "3-proof").write_bytes(b"\3" + bytes(dialler.outgoing))
    (folder / "4-frame").write_bytes(b"\4" + (16).to_bytes(4, "big") + bytes(48))

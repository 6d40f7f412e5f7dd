"""The TCP handshake and its frames, as a machine: every changed byte is seen, nothing is replayed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dwdp.distributed.secure import MAGIC, SecureChannel
from vllm_dwdp.errors import ProtocolError, RendezvousError, SecretMismatchError

SECRET = b"a secret of some length"


def channel(*, listens: bool, secret: bytes = SECRET, purpose: bytes = b"rank 0") -> SecureChannel:
    return SecureChannel(secret, purpose, listens=listens, max_bytes=1000)


def deliver(source: SecureChannel, target: SecureChannel, flip: int = -1) -> list[bytes]:
    """Carry what `source` has to say to `target`, with bit `flip` changed; the payloads."""
    data = bytearray(source.outgoing)
    source.outgoing.clear()
    if flip >= 0:
        data[flip // 8] ^= 1 << flip % 8
    payloads = []
    while data:
        part = bytes(data[: target.num_wanted])
        del data[: len(part)]
        payload = target.feed(part)
        if payload is not None:
            payloads.append(payload)
    return payloads


def opened() -> tuple[SecureChannel, SecureChannel]:
    listener, dialler = channel(listens=True), channel(listens=False)
    for _ in range(2):
        deliver(listener, dialler)
        deliver(dialler, listener)
    assert listener.is_open and dialler.is_open
    return listener, dialler


def test_messages_pass_both_ways_in_order() -> None:
    listener, dialler = opened()
    for text in (b"one", b"", b"three" * 200):
        dialler.send(text)
    assert deliver(dialler, listener) == [b"one", b"", b"three" * 200]
    listener.send(b"back")
    assert deliver(listener, dialler) == [b"back"]


def test_the_secret_itself_never_travels_and_no_two_conversations_are_alike() -> None:
    seen = []
    for _ in range(2):
        listener, dialler = channel(listens=True), channel(listens=False)
        greeting = bytes(listener.outgoing)
        deliver(listener, dialler)
        proof = bytes(dialler.outgoing)
        assert SECRET not in greeting + proof
        seen.append((greeting, proof))
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]


@pytest.mark.parametrize(
    "changes", [{"secret": b"another secret, as long"}, {"purpose": b"rank 1"}], ids=str
)
def test_who_does_not_know_the_secret_or_wants_another_rank_is_told_nothing(
    changes: dict[str, bytes],
) -> None:
    listener, dialler = channel(listens=True), channel(listens=False, **changes)
    deliver(listener, dialler)
    with pytest.raises(SecretMismatchError, match="does not know this rank's secret"):
        deliver(dialler, listener)
    assert bytes(listener.outgoing) == bytes(33), "nothing that depends on the secret is sent"
    with pytest.raises(SecretMismatchError, match="refused this rank's secret"):
        deliver(listener, dialler)


def test_an_impostor_that_listens_is_found_out() -> None:
    listener, dialler = channel(listens=True), channel(listens=False)
    deliver(listener, dialler)
    dialler.outgoing.clear()
    with pytest.raises(SecretMismatchError, match="did not prove"):
        dialler.feed(b"\1" + b"guess" * 6 + b"!!")


def test_a_message_is_not_taken_twice_nor_back_nor_elsewhere() -> None:
    listener, dialler = opened()
    dialler.send(b"borrow")
    frame = bytes(dialler.outgoing)
    assert deliver(dialler, listener) == [b"borrow"]
    for target in (listener, dialler, opened()[0]):
        target.feed(frame[:4])
        with pytest.raises(ProtocolError, match="not authentic: changed, repeated or moved"):
            target.feed(frame[4:])


def test_a_proof_cannot_be_replayed() -> None:
    listener, dialler = channel(listens=True), channel(listens=False)
    deliver(listener, dialler)
    with pytest.raises(SecretMismatchError):
        channel(listens=True).feed(bytes(dialler.outgoing))


@settings(max_examples=300)
@given(st.integers(0, 10**6), st.integers(0, 4))
def test_every_changed_bit_is_seen(flip: int, moment: int) -> None:
    listener, dialler = channel(listens=True), channel(listens=False)
    turns = [(listener, dialler), (dialler, listener), (listener, dialler)]
    turns += [(dialler, listener), (listener, dialler)]
    for number, (source, target) in enumerate(turns):
        if number >= 3:
            source.send(b"payload")
        changed = flip % (8 * len(source.outgoing)) if number == moment else -1
        try:
            payloads = deliver(source, target, changed)
        except RendezvousError:
            return
        if number >= 3 and payloads != [b"payload"]:
            # A greater length only makes the target wait for more; the frame is not taken.
            assert (number, payloads) == (moment, [])
            return
    pytest.fail("a changed bit was not seen")


@pytest.mark.parametrize("length", [1001, 2**31, 2**32 - 1])
def test_a_length_beyond_the_limit_is_refused_before_anything_is_kept(length: int) -> None:
    listener, _ = opened()
    with pytest.raises(ProtocolError, match=f"announced a message of {length} bytes"):
        listener.feed(length.to_bytes(4, "big"))


@settings(max_examples=500)
@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_refused_and_little_is_kept(data: bytes, listens: bool) -> None:
    target, rest = channel(listens=listens), data
    try:
        while rest:
            wanted = target.num_wanted
            assert 0 < wanted <= 1000 + 32
            assert target.feed(rest[:wanted]) is None
            rest = rest[wanted:]
    except RendezvousError:
        return
    assert len(data) <= len(MAGIC) + 32 + 32

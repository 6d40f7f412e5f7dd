"""Ranks that die and return: real sockets, real processes, real deaths."""

import multiprocessing
import os
import signal
import time

import pytest

from tests.multiprocess.members import meet_all, publish, rank, run_rank
from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.dialling import Dialler
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.unix import UnixEndpoint
from vllm_dwdp.errors import (
    PeerMismatchError,
)

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("nothing_leaks"),
]


def test_a_closing_rank_cannot_forget_its_successor(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removes its socket's name while it still listens: until then nobody takes its place."""
    member, listened = rank(endpoint, 0), []
    unlink = os.unlink

    def look_and_unlink(path: str) -> None:
        listened.append(endpoint.listening(0, [0], 1.0))
        unlink(path)

    monkeypatch.setattr(os, "unlink", look_and_unlink)
    member.close()
    assert listened == ([{0}] if isinstance(endpoint, UnixEndpoint) else [])


def test_a_stale_generation_is_refused(endpoint: Endpoint) -> None:
    keeper, seen = rank(endpoint, 0), rank(endpoint, 1)
    fd = publish(keeper)
    seen.close()
    stale = Dialler(endpoint, group=0, dwdp_rank=1, group_size=2, fingerprint=fingerprint())
    stale.generation = seen.generation - 1
    with pytest.raises(PeerMismatchError, match="is stale"):
        stale.fetch(0, 0)
    keeper.close()
    os.close(fd)


def test_the_shard_of_a_dead_rank_comes_from_whoever_holds_it(endpoint: Endpoint) -> None:
    """Ranks 1 and 2 die; 2 returns alone, and finds its own shard and rank 1's at rank 0."""
    members = [rank(endpoint, number, 3) for number in range(3)]
    fds = [publish(member) for member in members]
    meet_all(members)
    for victim in (1, 2):
        members[victim].close()
        os.close(fds[victim])
    returned = rank(endpoint, 2, 3)
    own = next(returned.recover())
    assert os.pread(own.fds[0], 1, 0) == b"2"
    assert own.digest == b"digest"
    returned.publish(own.fds, own.handle_bytes)
    shards = returned.meet()
    assert os.pread(shards[1].fds[0], 1, 0) == b"1"
    assert os.pread(shards[0].fds[0], 1, 0) == b"0"
    returned.announce_ready(own.digest)
    returned.wait_ready()
    assert {peer: state.state for peer, state in returned.peers().items()} == {
        0: "ready",
        1: "dead",
    }
    assert members[0].peers()[2].generation == returned.generation
    for shard in (own, *shards.values()):
        shard.close()
    returned.close()
    members[0].close()
    os.close(fds[0])


def test_a_peer_that_restarts_before_it_was_ready_is_mapped_anew(endpoint: Endpoint) -> None:
    """Its first shard never becomes whole; going on with that one would be silently wrong."""
    members = [rank(endpoint, number) for number in range(2)]
    fds = [publish(member) for member in members]
    for shard in members[0].meet().values():
        shard.close()
    members[1].close()
    reborn = rank(endpoint, 1)
    assert not list(reborn.recover())
    new = os.memfd_create("second life")
    os.write(new, b"2")
    reborn.publish([new], [4096])
    reborn.announce_ready(b"digest")
    (replaced,) = members[0].wait_ready().values()
    assert (replaced.rank, replaced.generation) == (1, reborn.generation)
    assert os.pread(replaced.fds[0], 1, 0) == b"2"
    replaced.close()
    for member in (reborn, members[0]):
        member.close()
    messages.close_all([*fds, new])


def test_a_peer_that_dies_once_it_was_ready_is_vouched_for_by_another(endpoint: Endpoint) -> None:
    members = [rank(endpoint, number, 3) for number in range(3)]
    fds = [publish(member) for member in members]
    for member in members:
        for shard in member.meet().values():
            shard.close()
        member.announce_ready(b"digest")
    members[1].wait_ready()
    members[2].close()
    assert members[0].wait_ready() == {}
    for member in members[:2]:
        member.close()
    messages.close_all(fds)


def test_the_group_keeps_its_limit_when_ranks_die_and_return(endpoint: Endpoint) -> None:
    """The least that was proposed; a rank that returns measures alone, and that counts for nothing."""
    members = [rank(endpoint, number, 3) for number in range(3)]
    fds = [publish(member) for member in members]
    for member, limit in zip(members, (90, 64, 77), strict=True):
        member.propose_limit(limit)
    meet_all(members)
    assert [member.agree_on_limit() for member in members] == [64] * 3
    for victim in (1, 2):
        members[victim].close()
    returned = rank(endpoint, 2, 3)
    own = next(returned.recover())
    returned.publish(own.fds, own.handle_bytes)
    returned.propose_limit(5)
    for shard in (own, *returned.meet().values()):
        shard.close()
    returned.announce_ready(own.digest)
    returned.wait_ready()
    assert returned.agree_on_limit() == 64
    for member in (returned, members[0]):
        member.close()
    messages.close_all(fds)


def test_what_was_agreed_with_a_peers_earlier_start_is_heard_of(endpoint: Endpoint) -> None:
    """Rank 0 has decided with rank 2, which starts again before rank 1 has heard of it."""
    members = [rank(endpoint, number, 3) for number in range(3)]
    fds = [publish(member) for member in members]
    for member, limit in zip(members, (40, 60, 10), strict=True):
        for shard in member.meet().values():
            shard.close()
        member.propose_limit(limit)
    for member in members[:2]:
        member.announce_ready(b"digest")
    assert members[1]._exchange._is_ready(0, {}), "with what it proposes, not with what is agreed"
    members[2].announce_ready(b"digest")
    members[0].wait_ready()
    assert members[0].agree_on_limit() == 10
    members[2].close()
    reborn = rank(endpoint, 2, 3)
    fds.append(publish(reborn))
    reborn.propose_limit(50)
    for shard in reborn.meet().values():
        shard.close()
    reborn.announce_ready(b"digest")
    for shard in members[1].wait_ready().values():
        shard.close()
    reborn.wait_ready()
    assert members[1].agree_on_limit() == reborn.agree_on_limit() == 10
    for member in (*members[:2], reborn):
        member.close()
    messages.close_all(fds)


def test_a_shard_that_was_never_whole_is_not_lent(endpoint: Endpoint) -> None:
    members = [rank(endpoint, number) for number in range(2)]
    fds = [publish(member) for member in members]
    for shard in members[0].meet().values():
        shard.close()
    members[1].close()
    returned = rank(endpoint, 1)
    assert not list(returned.recover())
    for member in (returned, members[0]):
        member.close()
    for fd in fds:
        os.close(fd)


def test_a_rank_that_returns_with_another_checkpoint_is_refused(endpoint: Endpoint) -> None:
    members = [rank(endpoint, number) for number in range(2)]
    fds = [publish(member) for member in members]
    meet_all(members)
    members[1].close()
    with pytest.raises(PeerMismatchError, match="checkpoint_digest is"):
        rank(endpoint, 1, fingerprint=fingerprint(checkpoint_digest="flipped"))
    assert members[0].peers()[1].state in ("ready", "dead"), "the survivor goes on"
    members[0].close()
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stopped_rank_delays_nobody(endpoint: Endpoint, sent: signal.Signals) -> None:
    """kill -9 shows as dead, and its socket is taken over; SIGSTOP holds nobody up."""
    spawn = multiprocessing.get_context("spawn")
    peer = spawn.Process(target=run_rank, args=(str(endpoint), 1))
    peer.start()
    member = rank(endpoint, 0, join_timeout_s=30)
    fd = publish(member)
    (shard,) = member.meet().values()
    assert peer.pid is not None
    os.kill(peer.pid, sent)
    started = time.monotonic()
    if sent == signal.SIGKILL:
        peer.join()
        assert member.peers()[1].state == "dead"
        successor = rank(endpoint, 1)
        assert member.peers()[1].state != "dead"
        successor.close()
    else:
        member.peers()
        assert os.pread(shard.fds[0], 1, 0) == b"1", "what was handed over stays readable"
        peer.kill()
        peer.join()
    assert time.monotonic() - started < 5
    shard.close()
    member.close()
    os.close(fd)
    peer.close()


def test_a_clock_that_was_set_back_does_not_keep_a_rank_out(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [rank(endpoint, number) for number in range(2)]
    fds = [publish(member) for member in members]
    meet_all(members)
    members[1].close()
    an_hour_ago = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: an_hour_ago)
    returned = rank(endpoint, 1)
    assert returned.returning.seen_generation == members[1].generation
    assert returned.generation == members[1].generation + 1
    own = next(returned.recover())
    returned.publish(own.fds, own.handle_bytes)
    for shard in (own, *returned.meet().values()):
        shard.close()
    assert members[0].peers()[1].generation == returned.generation
    for member in (returned, members[0]):
        member.close()
    messages.close_all(fds)

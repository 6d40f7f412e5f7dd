"""What a rank that comes back asks its peers, and how often."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.dialling import Dialler
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.group_state import GroupState
from vllm_dwdp.distributed.meeting import make_abstract_endpoint
from vllm_dwdp.distributed.published_shard import PublishedShard
from vllm_dwdp.distributed.returning import Return
from vllm_dwdp.distributed.server import Server
from vllm_dwdp.errors import PeerMismatchError

GROUP_SIZE = 4


def shard_of_rank_0(generation: int) -> PublishedShard:
    return PublishedShard(
        rank=0,
        generation=generation,
        fds=(os.memfd_create("shard"),),
        fabric_handles=(),
        handle_bytes=(4096,),
        layout=b"layout",
        digest=b"digest",
        ready=True,
    )


class Peer:
    """A peer that answers, and notes what it was asked."""

    def __init__(self, number: int) -> None:
        self.state = GroupState(number, GROUP_SIZE, fingerprint())
        self.asked: list[messages.Request] = []

    def answer(self, request: messages.Request) -> list[messages.Packet]:
        self.asked.append(request)
        assert not isinstance(request, messages.StatusRequest)
        return self.state.answer(request)

    @property
    def handles_asked(self) -> list[bool]:
        """Whether each request wanted handles."""
        return [request.wants_handles for request in self.asked]  # type: ignore[union-attr]


@contextmanager
def answering(endpoint: Endpoint, *peers: Peer) -> Iterator[None]:
    with ExitStack() as stack:
        for peer in peers:
            number = peer.state.dwdp_rank
            server = Server(
                endpoint.listen(0, number),
                lambda sock, number=number: endpoint.greet(sock, 0, number),  # type: ignore[misc]
                peer.answer,
                lambda: None,
                f"peer-{number}",
            )
            stack.callback(peer.state.close)
            stack.callback(server.close)
        yield


def dialler_at(endpoint: Endpoint, **changes: object) -> Dialler:
    return Dialler(
        endpoint, group=0, dwdp_rank=0, group_size=GROUP_SIZE, fingerprint=fingerprint(**changes)
    )


def test_peers_are_asked_once_and_lenders_once_more_for_the_handles() -> None:
    endpoint, peers = make_abstract_endpoint(), [Peer(1), Peer(2)]  # rank 3 is dead
    peers[1].state.hold(shard_of_rank_0(generation=1))
    with answering(endpoint, *peers):
        dialler = dialler_at(endpoint)
        returning = Return.ask(dialler)
        assert returning == Return(num_bytes=4096, lenders=(2,))
        assert [peer.handles_asked for peer in peers] == [[False], [False]]
        (shard,) = returning.shards(dialler)
        assert (shard.generation, shard.digest, len(shard.fds)) == (1, b"digest", 1)
        shard.close()
        assert [peer.handles_asked for peer in peers] == [[False], [False, True]]


def test_a_clock_that_was_set_back_costs_one_more_question() -> None:
    endpoint, peers = make_abstract_endpoint(), [Peer(1), Peer(2), Peer(3)]
    dialler = dialler_at(endpoint)
    later = dialler.generation + 10**12
    for peer in peers[:2]:
        peer.state.hold(shard_of_rank_0(later))
    with answering(endpoint, *peers):
        returning = Return.ask(dialler)
        assert returning == Return(seen_generation=later, num_bytes=4096, lenders=(1, 2))
        assert dialler.generation == later + 1
        assert [len(peer.asked) for peer in peers] == [2, 1, 1]
        for shard in returning.shards(dialler):
            shard.close()


def test_a_lender_that_dies_meanwhile_is_passed_over() -> None:
    endpoint, peers = make_abstract_endpoint(), [Peer(1), Peer(2)]
    for peer in peers:
        peer.state.hold(shard_of_rank_0(generation=1))
    with answering(endpoint, peers[1]):
        dialler = dialler_at(endpoint)
        with answering(endpoint, peers[0]):
            returning = Return.ask(dialler)
        assert returning.lenders == (1, 2)
        (shard,) = returning.shards(dialler)
        shard.close()


def test_a_peer_of_another_model_ends_the_return() -> None:
    endpoint, peer = make_abstract_endpoint(), Peer(1)
    with answering(endpoint, peer), pytest.raises(PeerMismatchError, match="dtype is"):
        Return.ask(dialler_at(endpoint, dtype="fp16"))

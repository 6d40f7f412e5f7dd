"""All ranks of a group run with one limit, whoever decides first or returns; nobody waits for it."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.group_state import GroupState
from vllm_dwdp.distributed.published_shard import PublishedShard

LIMITS = st.integers(0, 512)


class Rank:
    """One rank's knowledge of its group, without sockets: peers hear what it would answer."""

    def __init__(self, number: int, size: int, proposal: int | None, generation: int = 1) -> None:
        self.number, self.generation = number, generation
        self.state = GroupState(number, size, fingerprint())
        self.state.publish(
            PublishedShard(
                rank=number,
                generation=generation,
                fds=(),
                fabric_handles=(),
                handle_bytes=(1,),
                layout=b"",
                digest=b"",
                ready=False,
            )
        )
        self.state.propose_limit(proposal)
        self.state.announce_ready(b"digest")

    def answer(self, asking: int, generation: int) -> messages.Shard:
        """Return what it says of its shard, over the wire."""
        hello = messages.Hello(asking, generation, fingerprint(), wants_handles=False)
        ((reply, _),) = self.state.answer(hello)
        again = messages.decode_reply(messages.encode(reply))
        assert isinstance(again, messages.Shard)
        return again

    def hear(self, peer: "Rank") -> None:
        """Learn that the shard of `peer` is whole, as `ShardExchange` does."""
        said = peer.answer(self.number, self.generation)
        held = PublishedShard(
            rank=peer.number,
            generation=said.generation,
            fds=(),
            fabric_handles=(),
            handle_bytes=said.handle_bytes,
            layout=said.layout,
            digest=b"",
            ready=False,
        )
        self.state.hold(held)
        self.state.mark_whole(peer.number, said)


@given(st.data(), st.lists(st.none() | LIMITS, min_size=2, max_size=8))
def test_all_ranks_get_one_limit_in_any_order(
    data: st.DataObject, proposals: list[int | None]
) -> None:
    """A rank hears each peer before or after that has decided, and decides once it has heard all."""
    size = len(proposals)
    ranks = [Rank(number, size, proposal) for number, proposal in enumerate(proposals)]
    pairs = [(one, other) for one in range(size) for other in range(size) if one != other]
    heard = dict.fromkeys(range(size), 0)
    limits: dict[int, int | None] = {}
    for one, other in data.draw(st.permutations(pairs)):
        ranks[one].hear(ranks[other])
        heard[one] += 1
        if heard[one] == size - 1:
            limits[one] = ranks[one].state.agree_on_limit()
    given_limits = [proposal for proposal in proposals if proposal is not None]
    assert set(limits.values()) == {min(given_limits, default=None)}


@given(st.data(), st.lists(LIMITS, min_size=2, max_size=6), LIMITS)
def test_a_rank_that_returns_takes_what_the_group_runs_with(
    data: st.DataObject, proposals: list[int], measured_alone: int
) -> None:
    size = len(proposals)
    ranks = [Rank(number, size, proposal) for number, proposal in enumerate(proposals)]
    for one in ranks:
        for other in ranks:
            if one is not other:
                one.hear(other)
    (limit,) = {rank.state.agree_on_limit() for rank in ranks}
    number = data.draw(st.integers(0, size - 1))
    returned = Rank(number, size, measured_alone, generation=2)
    for peer in ranks:
        if peer.number != number:
            returned.hear(peer)
    assert returned.state.agree_on_limit() == limit
    assert returned.answer((number + 1) % size, 1).direct_limit == limit


def test_a_rank_that_has_no_choice_carries_the_limit_of_the_others() -> None:
    """So that one that returns finds it at any survivor."""
    chooses, forced = Rank(0, 2, 64), Rank(1, 2, None)
    chooses.hear(forced)
    forced.hear(chooses)
    assert chooses.state.agree_on_limit() == forced.state.agree_on_limit() == 64
    returned = Rank(0, 2, 99, generation=2)
    returned.hear(forced)
    assert returned.state.agree_on_limit() == 64


def test_ranks_without_a_choice_agree_on_nothing() -> None:
    ranks = Rank(0, 2, None), Rank(1, 2, None)
    ranks[0].hear(ranks[1])
    assert ranks[0].state.agree_on_limit() is None
    assert not ranks[0].answer(1, 1).limit_in_force


def test_a_limit_that_is_none_is_no_message() -> None:
    said = Rank(0, 2, 8).answer(1, 1)
    with pytest.raises(messages.ProtocolError, match="no message"):
        messages.decode_reply(messages.encode(msgspec.structs.replace(said, direct_limit=-1)))

"""A holder beside the ranks: shards outlive all of them, and never keep a new start out."""

import os
import time
from collections.abc import Iterator

import pytest

from tests.helpers.files import num_open_files
from tests.multiprocess.members import meet_all, publish, rank
from tests.multiprocess.pair import Pair
from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.distributed import held_shards, messages
from vllm_dwdp.distributed.dialling import Dialler
from vllm_dwdp.distributed.endpoint import HOLDER, Endpoint
from vllm_dwdp.distributed.holder import GroupHolder
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.distributed.status import query_status
from vllm_dwdp.errors import DwdpMemoryError, PeerMismatchError, RendezvousError

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(60)]

CHANGED = fingerprint(checkpoint_digest="changed")


@pytest.fixture
def holder(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[GroupHolder]:
    monkeypatch.setattr(held_shards, "CONNECTION_DEADLINE_S", 0.0)
    before = num_open_files()
    opened = GroupHolder.open(endpoint, 0, 2)
    yield opened
    opened.close()
    opened.close()
    assert num_open_files() == before


def adopted_inode(member: Membership) -> int:
    own = next(member.recover())
    try:
        assert own.digest == b"digest"
        return os.fstat(own.fds[0]).st_ino
    finally:
        own.close()


def test_all_ranks_die_and_find_their_shards_again(endpoint: Endpoint, holder: GroupHolder) -> None:
    first = Pair(endpoint)
    assert holder.look() == []
    status = query_status(endpoint, 0, HOLDER, 5.0)
    assert (status["held_ranks"], status["held_bytes"]) == ([0, 1], 8192)
    assert status["shared_bytes"] == 8192
    first.end()
    holder.look()
    status = holder.status()
    assert (status["held_bytes"], status["shared_bytes"]) == (8192, 0)

    returned = [rank(endpoint, number) for number in range(2)]
    assert [adopted_inode(member) for member in returned] == first.inodes
    met = returned[0].meet()  # nothing of rank 1 but what is held
    assert os.fstat(met[1].fds[0]).st_ino == first.inodes[1]
    assert met[1].is_lent and met[1].ready
    met[1].close()
    for member in returned:
        member.close()


def test_what_is_lent_tells_of_the_update_that_it_has_seen(
    endpoint: Endpoint, holder: GroupHolder
) -> None:
    """So a rank that has all of its group from a holder tells the others what they must read."""
    first = Pair(endpoint)
    for member in first.members:
        member._state.set_progress(messages.Progress(started=1, update=3, step=messages.Step.DONE))
        member.learn_update()
    holder.look()
    first.end()
    returned = rank(endpoint, 0)
    met = returned.meet()
    assert met[1].update == 3
    met[1].close()
    returned.close()


def test_a_shard_is_held_once_it_is_whole(endpoint: Endpoint, holder: GroupHolder) -> None:
    members = [rank(endpoint, number) for number in range(2)]
    fds = [publish(member) for member in members]
    assert holder.look() == [] and holder.status()["held_ranks"] == []
    meet_all(members)
    holder.look()
    assert holder.status()["held_ranks"] == [0, 1]
    for member in members:
        member.close()
    messages.close_all(fds)


def test_what_a_new_life_publishes_replaces_what_is_held(
    endpoint: Endpoint, holder: GroupHolder
) -> None:
    """Also of a rank that could not take its shard over; and nothing piles up."""
    first = Pair(endpoint)
    holder.look()
    first.end()
    files = num_open_files()
    second = Pair(endpoint)
    holder.look()
    second.end()
    holder.look()
    assert num_open_files() == files
    returned = rank(endpoint, 0)
    assert adopted_inode(returned) == second.inodes[0]
    returned.close()


def test_a_new_checkpoint_is_let_in_once_no_rank_runs_with_the_old_one(
    endpoint: Endpoint, holder: GroupHolder
) -> None:
    first = Pair(endpoint)
    holder.look()
    first.members[0].close()
    with pytest.raises(PeerMismatchError, match="rank 1 of group 0: .*checkpoint_digest"):
        rank(endpoint, 0, fingerprint=CHANGED)
    assert holder.look() == []
    assert holder.status()["held_ranks"] == [0, 1], "rank 1 runs with it"

    first.end()
    started = rank(endpoint, 0, fingerprint=CHANGED)
    assert list(started.recover()) == []
    (line,) = holder.look()
    assert line == (
        "the holder of group 0 gives up 0.00001 GiB of experts of ranks [0, 1], which no rank runs "
        "with: checkpoint_digest is 'c' here and 'changed' there"
    )
    assert holder.status()["held_ranks"] == []
    started.close()


def test_a_new_checkpoint_that_came_between_two_looks_replaces_the_old_one(
    endpoint: Endpoint, holder: GroupHolder
) -> None:
    first = Pair(endpoint)
    holder.look()
    first.end()
    second = Pair(endpoint, fingerprint=CHANGED)
    (line,) = holder.look()
    assert "gives up 0.00001 GiB of experts of ranks [0, 1]" in line
    assert holder.status()["held_ranks"] == [0, 1]
    second.end()


def test_what_no_rank_could_start_with_is_given_up(endpoint: Endpoint, holder: GroupHolder) -> None:
    """As where its layout is another one, which a rank sees only after it has built its model."""
    first = Pair(endpoint)
    holder.look()
    first.members[0].close()
    with pytest.raises(ValueError, match="layout"), rank(endpoint, 0):
        raise ValueError("the layout differs")
    assert holder.look() == [], "rank 1 runs with it"
    first.end()
    with pytest.raises(ValueError, match="layout"), rank(endpoint, 0):
        raise ValueError("the layout differs")
    (line,) = holder.look()
    assert line.endswith("rank 0 failed to start: ValueError: the layout differs")
    started = rank(endpoint, 0)
    assert list(started.recover()) == []
    started.close()


def test_an_old_doubt_is_forgotten(
    endpoint: Endpoint, holder: GroupHolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Pair(endpoint)
    holder.look()
    stranger = Dialler(endpoint, group=0, dwdp_rank=0, group_size=2, fingerprint=CHANGED)
    assert isinstance(stranger.ask(HOLDER, 0), messages.NotYet)
    monkeypatch.setattr(held_shards, "DOUBT_S", 0.0)
    holder.look()
    first.end()
    assert holder.look() == []
    assert holder.status()["held_ranks"] == [0, 1]


def test_a_clock_that_was_set_back_does_not_keep_a_rank_out(
    endpoint: Endpoint, holder: GroupHolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Pair(endpoint)
    holder.look()
    first.end()
    an_hour_ago = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: an_hour_ago)
    returned = rank(endpoint, 1)
    assert returned.generation == first.members[1].generation + 1
    assert adopted_inode(returned) == first.inodes[1]
    returned.close()


def test_a_group_has_one_holder(endpoint: Endpoint, holder: GroupHolder) -> None:
    with pytest.raises(RendezvousError, match="the holder of group 0 is already running"):
        GroupHolder.open(endpoint, 0, 2)


def test_a_shard_of_more_files_than_may_be_opened_is_not_held(endpoint: Endpoint) -> None:
    def refuse(num_files: int, purpose: str) -> None:
        raise DwdpMemoryError(f"{num_files} files for {purpose}")

    holder, first = GroupHolder.open(endpoint, 0, 2, refuse), Pair(endpoint)
    assert holder.look() == [
        f"the holder of group 0 cannot hold rank {number}'s experts: 1 files for holding the experts "
        f"of rank {number}"
        for number in range(2)
    ]
    first.end()
    holder.close()


def test_a_shard_that_is_passed_by_fabric_handles_only_is_not_held(
    endpoint: Endpoint, holder: GroupHolder
) -> None:
    """As on a machine whose driver makes no descriptors; its ranks meet and serve all the same."""
    members = [rank(endpoint, number) for number in range(2)]
    for member in members:
        member.publish((), [4096], [b"f" * 64])
    meet_all(members)
    news = holder.look()
    assert len(news) == 2 and all(
        "fabric handles only, which keep nothing" in line for line in news
    )
    assert holder.look() == [], "it is said once"
    assert query_status(endpoint, 0, HOLDER, 5.0)["held_ranks"] == []
    for member in members:
        member.close()

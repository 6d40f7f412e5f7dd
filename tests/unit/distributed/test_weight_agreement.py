"""How ranks renew their weights together: nobody serves while somebody writes, or after a failure."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import msgspec
import pytest

from tests.helpers.waiting import wait_until
from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.meeting import make_abstract_endpoint
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.distributed.messages import Step
from vllm_dwdp.distributed.returning import renewed_weights
from vllm_dwdp.errors import PeerMismatchError, WeightUpdateError

NUM_RANKS = 3
TIMEOUT_S = 20.0


class Group:
    """Ranks that have met, each in a thread of its own; which of them serve, and which ever wrote."""

    def __init__(self, timeout_s: float) -> None:
        self.endpoint = make_abstract_endpoint()
        self.timeout_s = timeout_s
        self.pool = ThreadPoolExecutor(NUM_RANKS)
        self.serving = set(range(NUM_RANKS))
        self.wrote: set[int] = set()
        self.ranks = [self.join(rank) for rank in range(NUM_RANKS)]
        for waiting in [self.pool.submit(self._meet, rank) for rank in self.ranks]:
            waiting.result()

    def join(self, rank: int, **changes: object) -> Membership:
        joined = Membership.join(
            self.endpoint,
            group=0,
            dwdp_rank=rank,
            group_size=NUM_RANKS,
            fingerprint=fingerprint(**changes),
            join_timeout_s=self.timeout_s,
        )
        fd = os.memfd_create("shard")
        joined.publish((fd,), (4096,), layout=b"old")
        os.close(fd)
        return joined

    def _meet(self, rank: Membership) -> None:
        for shard in rank.meet().values():
            shard.close()
        rank.announce_ready(b"old digest")
        assert not rank.wait_ready()
        rank.learn_update()

    def update(
        self, number: int, new: str = "new", fails: Callable[[str], None] = lambda step: None
    ) -> None:
        """One rank's part of an update; `fails` is called before each of its steps."""
        rank, weights = self.ranks[number], self.ranks[number].weights
        self.serving.discard(number)
        try:
            fails("pause")
            weights.lock(lambda: fails("check"))
        except WeightUpdateError:
            if not weights.refusal:
                self.serving.add(number)
            raise
        try:
            fails("write")
            assert not self.serving, f"rank {number} writes while {self.serving} serve"
            self.wrote.add(number)
            fails("agree")
            weights.agree(new.encode())
            fails("complete")
            said = weights.complete(f"{new} digest of {number}".encode())
        except BaseException as error:
            weights.fail(error)
            raise
        made = msgspec.structs.replace(rank.fingerprint, checkpoint_digest=new)
        weights.finish(made, new.encode(), said)
        self.serving.add(number)

    def update_all(self, **of_rank: Callable[[], None]) -> list[BaseException | None]:
        """All ranks renew their weights, or do what is given for one; what each raised."""
        works = [
            of_rank.get(f"rank{number}", lambda number=number: self.update(number))  # type: ignore[misc]
            for number in range(NUM_RANKS)
        ]
        done: list[Future[None]] = [self.pool.submit(work) for work in works]
        return [each.exception(timeout=2 * TIMEOUT_S) for each in done]


@contextmanager
def group(timeout_s: float = TIMEOUT_S) -> Iterator[Group]:
    made = Group(timeout_s)
    with ExitStack() as stack:
        stack.callback(made.pool.shutdown)
        for number in range(NUM_RANKS):
            stack.callback(lambda number=number: made.ranks[number].close())  # type: ignore[misc]
        yield made


def test_all_ranks_go_on_together_and_lend_the_new_shards() -> None:
    with group() as ranks:
        before = [rank._state._published.generation for rank in ranks.ranks]  # type: ignore[union-attr]
        for update in (1, 2):
            assert ranks.update_all() == [None] * NUM_RANKS
            assert ranks.serving == {0, 1, 2}
            assert [rank.weights.update for rank in ranks.ranks] == [update] * NUM_RANKS
        for rank, generation in zip(ranks.ranks, before, strict=True):
            # A holder takes it anew: it asks for what is not of the start that it has.
            identity, shard = (
                packet for packet, _ in rank._state.answer_holder(messages.Keep(generation))[:2]
            )
            assert isinstance(identity, messages.Identity) and isinstance(shard, messages.Shard)
            assert identity.fingerprint.checkpoint_digest == "new"
            assert (shard.layout, shard.ready, shard.update) == (b"new", True, 2)
            for other, held in rank._state.held().items():
                assert (held.ready, held.digest) == (True, f"new digest of {other}".encode())
        # A rank that starts with the old weights is refused, with what to do; one with the new is not.
        ranks.ranks[0].close()
        with pytest.raises(
            PeerMismatchError,
            match=r"been updated .*\(update 2\), from /m: make that checkpoint readable",
        ):
            ranks.join(0)
        ranks.ranks[0] = ranks.join(0, checkpoint_digest="new")
        (back, *_) = ranks.ranks[0].recover()
        assert (back.digest, back.update) == (b"new digest of 0", 2)
        back.close()


@pytest.mark.parametrize("how", ["raises", "dies"])
@pytest.mark.parametrize("where", ["write", "agree", "complete"])
def test_whoever_fails_leaves_all_others_refusing_until_an_update_succeeds(
    where: str, how: str
) -> None:
    with group() as ranks:

        def fail(step: str) -> None:
            if step == where:
                if how == "dies":
                    ranks.ranks[1].close()
                raise OSError("no disk")

        errors = ranks.update_all(rank1=lambda: ranks.update(1, fails=fail))
        assert isinstance(errors[1], OSError)
        assert not ranks.serving
        said = "is dead" if how == "dies" else "rank 1 of group 0: .*no disk"
        for number in (0, 2):
            assert isinstance(errors[number], WeightUpdateError)
            with pytest.raises(WeightUpdateError, match=f"{said}.*|is dead"):
                raise errors[number]  # type: ignore[misc]
            refusal = ranks.ranks[number].weights.refusal
            assert "Repeat the update on all ranks; if one of them has died" in refusal
        if how == "raises":
            assert ranks.update_all() == [None] * NUM_RANKS
            assert ranks.serving == {0, 1, 2} and not ranks.ranks[0].weights.refusal
        else:
            with pytest.raises(PeerMismatchError, match="restart all ranks of the group"):
                ranks.join(1, checkpoint_digest="new")


def told_by(ranks: Group) -> str | None:
    """Return the digest of what a rank that starts as rank 0 is told to read."""
    told = renewed_weights(ranks.endpoint, group=0, dwdp_rank=0, group_size=NUM_RANKS)
    return None if told is None else told.checkpoint_digest


def test_a_rank_that_starts_is_told_what_was_read_since_the_group_started() -> None:
    with group() as ranks:
        assert told_by(ranks) is None, "what the command line names"
        assert ranks.update_all() == [None] * NUM_RANKS
        assert told_by(ranks) == "new"
        with pytest.raises(WeightUpdateError):
            ranks.update(1, fails=lambda step: ranks.ranks[0].close())
        assert not ranks.ranks[1].weights.refusal and told_by(ranks) == "new"
        ranks.ranks[0] = ranks.join(0, checkpoint_digest="new")
        ranks._meet(ranks.ranks[0])
        ranks.ranks[1].close()
        ranks.ranks[2].close()
        told = renewed_weights(ranks.endpoint, group=0, dwdp_rank=1, group_size=NUM_RANKS)
        assert told is not None and told.checkpoint_digest == "new", "it has learned that itself"


def test_a_rank_that_starts_is_told_nothing_that_no_start_can_read() -> None:
    with group() as ranks:
        seen: list[str | None] = []
        works = {
            f"rank{number}": partial(
                ranks.update, number, new="update 1", fails=lambda step: seen.append(told_by(ranks))
            )
            for number in range(NUM_RANKS)
        }
        assert ranks.update_all(**works) == [None] * NUM_RANKS
        assert {told_by(ranks), *seen} == {None}
        ranks.ranks[0].close()
        with pytest.raises(
            PeerMismatchError, match=r"\(update 1\) by a trainer: restart all ranks of the group"
        ):
            ranks.join(0)
    with group() as ranks:
        assert ranks.update_all() == [None] * NUM_RANKS

        def fail(step: str) -> None:
            assert step != "agree", "no disk"

        assert None not in ranks.update_all(rank1=lambda: ranks.update(1, fails=fail))
        assert told_by(ranks) is None, "nobody knows what the memory holds"


def test_one_update_follows_another_at_once() -> None:
    """A rank that is done begins the next while others still have to hear that it is."""
    with group() as ranks:

        def five_times(number: int) -> None:
            for _ in range(5):
                ranks.update(number)

        works = {f"rank{number}": partial(five_times, number) for number in range(NUM_RANKS)}
        assert ranks.update_all(**works) == [None] * NUM_RANKS
        assert [rank.weights.update for rank in ranks.ranks] == [5] * NUM_RANKS


def test_other_weights_on_one_rank_are_found_before_anybody_serves() -> None:
    with group() as ranks:
        errors = ranks.update_all(rank2=lambda: ranks.update(2, new="other"))
        assert all(isinstance(error, WeightUpdateError) for error in errors)
        assert "has written other weights than this one" in str(errors)
        assert not ranks.serving and all(rank.weights.refusal for rank in ranks.ranks)


def test_nothing_is_written_before_all_have_paused() -> None:
    with group(timeout_s=1.0) as ranks:
        errors = ranks.update_all(rank1=lambda: None)
        for error in (errors[0], errors[2]):
            assert "did not pause for new weights within" in str(error)
            assert "this rank goes on with the weights that it has" in str(error)
        assert ranks.serving == {0, 1, 2} and not ranks.wrote
        assert not any(rank.weights.refusal for rank in ranks.ranks)
    with group() as ranks:
        ranks.ranks[1].close()
        errors = ranks.update_all(rank1=lambda: None)
        assert "rank 1 of group 0 is dead" in str(errors[0])
        assert {0, 2} <= ranks.serving and not ranks.wrote


def test_a_rank_that_gives_up_after_others_saw_it_pause_serves_on_and_so_do_they() -> None:
    with group() as ranks:
        weights = ranks.ranks[1].weights
        weights._go_to(1, Step.PAUSED)
        others = [ranks.pool.submit(ranks.update, number) for number in (0, 2)]
        wait_until(
            lambda: all(ranks.ranks[n]._state.progress().step == Step.LOCKED for n in (0, 2))
        )
        doing = [ranks.ranks[n].status()["doing"] for n in (0, 2)]
        assert all(said.startswith("waits for ranks [1] to lock their experts") for said in doing)
        assert all(rank.weights.is_under_way for rank in ranks.ranks)
        weights._go_to(1, Step.WITHDRAWN)
        for other in others:
            with pytest.raises(WeightUpdateError, match="not begun: rank 1 of group 0 withdrew"):
                other.result(timeout=TIMEOUT_S)
        assert ranks.serving == {0, 1, 2} and not ranks.wrote
        assert not any(rank.weights.refusal for rank in ranks.ranks)
        assert ranks.update_all() == [None] * NUM_RANKS


def test_a_rank_that_cannot_read_the_new_weights_costs_nobody_the_old_ones() -> None:
    with group() as ranks:

        def fail(step: str) -> None:
            if step == "check":
                raise OSError("no such checkpoint")

        errors = ranks.update_all(rank1=lambda: ranks.update(1, fails=fail))
        assert "was not begun: no such checkpoint. Nothing was written" in str(errors[1])
        for number in (0, 2):
            assert "cannot take them. Nothing was written" in str(errors[number])
        assert ranks.serving == {0, 1, 2} and not ranks.wrote
        assert not any(rank.weights.refusal for rank in ranks.ranks)
        assert ranks.update_all() == [None] * NUM_RANKS


def test_ranks_that_counted_different_updates_find_one_number() -> None:
    with group(timeout_s=1.5) as ranks:
        for _ in range(2):  # rank 0 alone
            with pytest.raises(WeightUpdateError):
                ranks.update(0)
        assert ranks.update_all() == [None] * NUM_RANKS
        assert len({rank.weights.update for rank in ranks.ranks}) == 1
        assert ranks.ranks[0].weights.update > 2


def test_a_rank_that_starts_while_others_write_is_sent_away() -> None:
    with group() as ranks:
        seen: list[str] = []

        def look(step: str) -> None:
            if step == "agree":
                hello = messages.Hello(1, 2**61, fingerprint())
                ((reply, _),) = ranks.ranks[0]._state.answer(hello)
                assert isinstance(reply, messages.Refused)
                seen.append(reply.reason)

        assert ranks.update_all(rank0=lambda: ranks.update(0, fails=look)) == [None] * NUM_RANKS
        assert seen == [
            "the ranks of this group are writing new weights. Start again when they have"
        ]
        assert threading.active_count() < 20

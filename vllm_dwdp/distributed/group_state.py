"""The group as one of its ranks knows it, and what that rank therefore answers.

Shared by the thread that starts the rank and the one that answers its peers; every method takes the
lock, and none waits for another.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import msgspec

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.fingerprint import Fingerprint, advice, describe
from vllm_dwdp.distributed.messages import Step
from vllm_dwdp.distributed.published_shard import PeerState, PublishedShard, agreed_limit
from vllm_dwdp.errors import PeerMismatchError, RendezvousError

MAX_REASON = 4000


class GroupState:
    """The shards, generations and failures of one group, as one of its ranks sees them.

    Owns the descriptors of every shard in it; `close` closes them, once no thread answers any more.

    Args:
        dwdp_rank: our position in the group.
        group_size: ranks of the group.
        fingerprint: what every peer must equal.
    """

    def __init__(self, dwdp_rank: int, group_size: int, fingerprint: Fingerprint) -> None:
        self.dwdp_rank = dwdp_rank
        self.group_size = group_size
        self.fingerprint = fingerprint
        self.last_failure = (0.0, "")
        self._lock = threading.Lock()
        self._published: PublishedShard | None = None
        self._held: dict[int, PublishedShard] = {}
        self._retired: list[PublishedShard] = []  # a reply may still be sending them
        self._failures: dict[int, str] = {}
        self._refusals: dict[int, str] = {}
        self._generations: dict[int, int] = {}
        self._dead: set[int] = set()
        self._progress = messages.Progress(started=0, update=0, step=Step.DONE)

    @property
    def peer_ranks(self) -> tuple[int, ...]:
        """The other ranks, starting after our own."""
        return ranks_after(self.dwdp_rank, self.group_size)

    def close(self) -> None:
        """Close the descriptors; idempotent."""
        with self._lock:
            shards = [*self._held.values(), *self._retired]
            shards += [self._published] if self._published else []
            self._published, self._held, self._retired = None, {}, []
        for shard in shards:
            shard.close()

    def publish(self, shard: PublishedShard) -> None:
        """Hand our own shard to every peer that asks, from now on."""
        with self._lock:
            assert self._published is None
            self._published = shard

    def propose_limit(self, limit: int | None) -> None:
        """Say, with the word that our shard is whole, up to which step this rank would read in place."""
        with self._lock:
            assert self._published is not None
            self._published = replace(self._published, direct_limit=limit)

    def agree_on_limit(self) -> int | None:
        """Take the limit that the group runs with, or the one that all ranks infer from the proposals.

        Every shard is whole, so every rank's proposal is here: no rank is asked, and none waits. A
        rank that returns finds the limit in force at any survivor; its own measurement counts for
        nothing.
        """
        with self._lock:
            assert self._published is not None
            limit = agreed_limit([self._published, *self._held.values()])
            self._published = replace(
                self._published, direct_limit=limit, limit_in_force=limit is not None
            )
        return limit

    def announce_ready(self, digest: bytes) -> None:
        """Let peers map our shard: it is whole."""
        with self._lock:
            assert self._published is not None
            self._published = replace(self._published, digest=digest, ready=True)

    def hold(self, shard: PublishedShard) -> None:
        """Keep a peer's shard; it is lent to others once it is whole."""
        rank = shard.rank
        with self._lock:
            if rank in self._held:
                self._retired.append(self._held[rank])
            self._held[rank] = shard
            seen = self._generations.get(rank, 0)
            self._generations[rank] = max(shard.generation, seen)

    def held(self) -> dict[int, PublishedShard]:
        """Return the shards of the peers we met."""
        with self._lock:
            return dict(self._held)

    def mark_whole(self, rank: int, shard: messages.Shard) -> None:
        """Lend the shard that we hold of `rank` from now on: it is whole, as `shard` says."""
        with self._lock:
            self._held[rank] = replace(
                self._held[rank],
                digest=shard.digest,
                ready=True,
                direct_limit=shard.direct_limit,
                limit_in_force=shard.limit_in_force,
                update=shard.update,
            )

    def progress(self) -> messages.Progress:
        """How far this rank is with new weights."""
        with self._lock:
            return self._progress

    def set_progress(self, progress: messages.Progress) -> None:
        """Say so from now on."""
        with self._lock:
            if progress.failure and not self._progress.failure:
                self._note(progress.failure)
            self._progress = progress

    def begin_update(self) -> None:
        """Every shard of the group is about to be written, so none is whole, and none is lent."""
        with self._lock:
            assert self._published is not None
            self._published = replace(self._published, digest=b"", ready=False)
            self._held = {
                rank: replace(held, digest=b"", ready=False) for rank, held in self._held.items()
            }

    def end_update(
        self, fingerprint: Fingerprint, layout: bytes, peers: Mapping[int, messages.Progress]
    ) -> None:
        """Every shard of the group is whole again, and of these weights."""
        with self._lock:
            assert self._published is not None
            progress = {self.dwdp_rank: self._progress, **peers}
            renewed = {
                rank: replace(
                    shard,
                    generation=progress[rank].generation,
                    digest=progress[rank].digest,
                    layout=layout,
                    ready=True,
                    update=self._progress.update,
                )
                for rank, shard in {self.dwdp_rank: self._published, **self._held}.items()
            }
            self.fingerprint = fingerprint
            self._published = renewed.pop(self.dwdp_rank)
            self._held = renewed

    def learn_update(self) -> int:
        """Take the number of the last update from the peers that we met; returns it."""
        with self._lock:
            assert self._published is not None
            update = max([self._progress.update, *(held.update for held in self._held.values())])
            self._progress = msgspec.structs.replace(self._progress, update=update)
            self._published = replace(self._published, update=update)
        return update

    def peer_states(
        self, held: Mapping[int, PublishedShard], alive: set[int]
    ) -> dict[int, PeerState]:
        """Return the state of each peer, given which of those we met still listen; notes new deaths."""
        states = {}
        with self._lock:
            for rank in sorted(self.peer_ranks):
                state = "missing"
                if rank in held:
                    state = "ready" if held[rank].ready else "published"
                    self._note_death(rank, rank in alive)
                    state = state if rank in alive else "dead"
                states[rank] = PeerState(state, self._generations.get(rank, 0))
        return states

    def raise_failures(self, group: int) -> None:
        """Give up if a peer did, or if it serves something else.

        Raises:
            PeerMismatchError: we refused a peer that we have not met.
            RendezvousError: a peer failed to start.
        """
        with self._lock:
            failures, refusals = dict(self._failures), dict(self._refusals)
        for rank, reason in refusals.items():
            raise PeerMismatchError(f"rank {rank} of group {group}: {reason}")
        for rank, reason in failures.items():
            raise RendezvousError(f"rank {rank} of group {group} failed to start: {reason}")

    def answer(
        self, request: messages.Hello | messages.Borrow | messages.Failed
    ) -> list[messages.Packet]:
        """Make the packets of our reply to a peer."""
        with self._lock:
            refusal = self._refusal(request)
            if refusal is not None:
                return [(refusal, ())]
            rank = request.dwdp_rank
            self._generations[rank] = request.generation
            if isinstance(request, messages.Failed):
                self._failures[rank] = request.reason[:MAX_REASON]
                self._note(f"rank {rank} failed to start: {self._failures[rank]}")
                return [(messages.Accepted(), ())]
            # It starts again: what its earlier start failed for is over, whatever it asks first.
            self._refusals.pop(rank, None)
            self._failures.pop(rank, None)
            if isinstance(request, messages.Borrow) and request.wanted != self.dwdp_rank:
                held = self._held.get(request.wanted)
                shard = held if held is not None and held.ready else None
            else:
                shard = self._published
        if shard is None:
            return [(messages.NotYet(), ())]
        return list(shard.packets(with_handles=request.wants_handles))

    def answer_holder(self, request: messages.Keep) -> list[messages.Packet]:
        """Make the packets of our reply to a holder, which gets our shard once that is whole."""
        with self._lock:
            shard = self._published
        if shard is None or not shard.ready:
            return [(messages.NotYet(), ())]
        if shard.generation == request.have:
            return [(messages.Accepted(), ())]
        return [(messages.Identity(self.fingerprint), ()), *shard.packets(with_handles=True)]

    def answer_newcomer(self) -> messages.Reply:
        """Say which checkpoint the group has read since it started, to a rank that will join it."""
        with self._lock:
            is_known = not self._progress.unsettled and self.fingerprint.checkpoint is not None
            if self._update and is_known:
                return messages.Identity(self.fingerprint)
        return messages.NotYet()

    @property
    def _update(self) -> int:
        """The last update that our shard has seen; 0 if none."""
        return 0 if self._published is None else self._published.update

    def _refusal(
        self, request: messages.Hello | messages.Borrow | messages.Failed
    ) -> messages.Refused | None:
        """Return the reason why we do not talk to this peer, or None."""
        rank = request.dwdp_rank
        if rank not in self.peer_ranks:
            return messages.Refused(
                f"rank {rank} is no other rank of this group: this is rank {self.dwdp_rank} of "
                f"{self.group_size}. Start every rank with the same --data-parallel-size, group_size "
                "and rendezvous"
            )
        if isinstance(request, messages.Hello | messages.Borrow):
            if unsettled := self._progress.unsettled:
                return messages.Refused(unsettled[:MAX_REASON])
            differences = self.fingerprint.differences(request.fingerprint)
            if differences:
                reason = "the ranks do not serve the same model and layout: "
                reason += describe(differences) + ". "
                reason = (reason + advice(self.fingerprint, self._update, differences))[:MAX_REASON]
                if rank not in self._held:
                    self._refusals[rank] = reason
                self._note(f"rank {rank} was refused: {reason}")
                return messages.Refused(reason)
        seen = self._generations.get(rank, 0)
        if request.generation < seen:
            reason = (
                f"generation {request.generation} of rank {rank} is stale: generation {seen}, a later "
                "start, has joined. End the older process"
            )
            self._note(f"rank {rank} was refused: {reason}")
            return messages.Refused(reason, seen)
        return None

    def _note_death(self, rank: int, alive: bool) -> None:
        if alive:
            self._dead.discard(rank)
        elif rank not in self._dead:
            self._dead.add(rank)
            self._note(f"rank {rank} died: it no longer listens")

    def _note(self, failure: str) -> None:
        self.last_failure = (time.time(), failure)


def ranks_after(dwdp_rank: int, group_size: int) -> tuple[int, ...]:
    """Return the other ranks of a group, starting after `dwdp_rank`."""
    return tuple((dwdp_rank + step) % group_size for step in range(1, group_size))

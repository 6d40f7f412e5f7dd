"""The exchange of shards with every peer: two waits, both bounded, which name who is missing."""

import time
from collections.abc import Callable

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.dialling import Dialler
from vllm_dwdp.distributed.group_state import GroupState
from vllm_dwdp.distributed.published_shard import PublishedShard, closed_on_error
from vllm_dwdp.distributed.status import RankStatus
from vllm_dwdp.distributed.waiting import Wait
from vllm_dwdp.errors import JoinTimeoutError

POLL_INTERVAL_S = 0.05


class ShardExchange:
    """How a starting rank gets the shards of its peers.

    Args:
        dialler: reaches the peers.
        state: learns what they have.
        status: learns what we wait for.
        join_timeout_s: deadline of each wait.
    """

    def __init__(
        self, dialler: Dialler, state: GroupState, status: RankStatus, join_timeout_s: float
    ) -> None:
        self._dialler = dialler
        self._state = state
        self._status = status
        self._join_timeout_s = join_timeout_s

    def meet(self) -> dict[int, PublishedShard]:
        """Wait for every peer's shard; by rank, owned by the caller.

        Raises:
            JoinTimeoutError: peers did not publish in time; names them.
            PeerMismatchError: a peer has another model, layout or version.
            SecretMismatchError: a peer has another secret.
            RendezvousError: a peer gave up its start; quotes its reason.
        """
        shards: dict[int, PublishedShard] = {}
        with closed_on_error(shards):
            self._poll_peers(lambda rank: self._fetch(rank, shards), "publish their experts")
        self._status.doing = "maps the experts of its peers"
        return shards

    def wait_ready(self) -> dict[int, PublishedShard]:
        """Wait until every peer's pages are whole.

        A peer that restarted since `meet` has another shard now, and the one that we mapped may
        never become whole: its new one is returned, owned by the caller, to be mapped in its place.

        Raises:
            JoinTimeoutError, RendezvousError: as `meet`.
        """
        replaced: dict[int, PublishedShard] = {}
        with closed_on_error(replaced):
            self._poll_peers(
                lambda rank: self._is_ready(rank, replaced), "complete their shared pages"
            )
            if replaced:
                self._hear_again(set(self._dialler.peer_ranks) - set(replaced))
        self._status.doing = "binds its experts"
        return replaced

    def _poll_peers(self, step: Callable[[int], bool], purpose: str) -> None:
        """Call `step(rank)` for every peer until all returned true, or the deadline passed."""
        dialler = self._dialler
        who = f"DWDP rank {dialler.dwdp_rank} of group {dialler.group}"
        wait = Wait(who, dialler.peer_ranks, purpose, self._join_timeout_s)
        self._status.doing = dialler.wait = wait
        while True:
            for rank in sorted(wait.missing):
                if step(rank):
                    wait.missing -= {rank}
            if not wait.missing:
                return
            self._state.raise_failures(dialler.group)
            if wait.left_s < 0:
                raise self._timeout(sorted(wait.missing), purpose)
            wait.notice()
            time.sleep(POLL_INTERVAL_S)

    def _timeout(self, missing: list[int], purpose: str) -> JoinTimeoutError:
        dialler = self._dialler
        seen = "".join(
            f" The last exchange with rank {rank} failed: {dialler.problems[rank]}."
            for rank in missing
            if rank in dialler.problems
        )
        return JoinTimeoutError(
            f"ranks {missing} of group {dialler.group} did not {purpose} within dwdp "
            f"join_timeout_s={self._join_timeout_s:g} (this is rank {dialler.dwdp_rank} of "
            f"{dialler.group_size}, meeting at {dialler.endpoint}).{seen} Check that those ranks "
            "were started with the same rendezvous and did not fail, or raise join_timeout_s."
        )

    def _fetch(self, rank: int, shards: dict[int, PublishedShard]) -> bool:
        """Get the shard of `rank`: from itself, or, if it is dead, from a rank or holder that has it."""
        for peer in (rank, *self._lenders_of(rank)):
            shard = self._dialler.fetch(peer, rank)
            if shard is not None:
                if rank in shards:
                    shards[rank].close()
                shards[rank] = shard
                self._state.hold(shard.duplicate())
                return True
        return False

    def _is_ready(self, rank: int, replaced: dict[int, PublishedShard]) -> bool:
        """Whether the shard of `rank` that we hold is whole; if it has another now, fetch that."""
        held = self._state.held()[rank]
        if held.ready:
            return True
        answers = {rank: self._dialler.ask(rank, rank)}
        if answers[rank] is None:
            answers = {peer: self._dialler.ask(peer, rank) for peer in self._lenders_of(rank)}
        for peer, answer in answers.items():
            self._dialler.raise_refusal(peer, answer)
            if not isinstance(answer, messages.Shard):
                continue
            if answer.generation != held.generation:
                return self._fetch(rank, replaced) and replaced[rank].ready
            if answer.ready:
                self._state.mark_whole(rank, answer)
                return True
        return False

    def _hear_again(self, ranks: set[int]) -> None:
        """Learn what peers have agreed on by now, perhaps with the earlier start of another."""
        held = self._state.held()
        for rank in sorted(ranks):
            answer = self._dialler.ask(rank, rank)
            if (
                isinstance(answer, messages.Shard)
                and answer.ready
                and answer.generation == held[rank].generation
            ):
                self._state.mark_whole(rank, answer)

    def _lenders_of(self, rank: int) -> list[int]:
        """Who else may hold the shard of `rank`."""
        return [peer for peer in self._dialler.lenders if peer != rank]

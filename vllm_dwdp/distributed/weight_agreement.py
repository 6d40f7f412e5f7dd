"""How the ranks of a group renew their weights together: all pause, all write, all agree, all go on.

::

    this rank    PAUSED ------> LOCKED ------> (writes) WRITTEN ------> (edges) WHOLE ------> DONE
    waits until        all PAUSED      all LOCKED           all WRITTEN            all WHOLE

No rank writes before all have said LOCKED, so no peer reads an expert while it changes. No rank goes
on before the memory of all is whole and was written from the same weights. A rank that is only PAUSED
may give up, for none can have written then; so it looks then whether it can read the new weights. From
LOCKED on, a rank that cannot go on refuses to serve, because memory that it reads may be old and new
in parts.

Every wait has a deadline, and ends at once if a peer died, started anew, or failed. Runs in the thread
of the rank's worker, between forwards. `GroupState` answers the peers meanwhile.
"""

import time
from collections.abc import Callable, Mapping

import msgspec

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.dialling import Dialler
from vllm_dwdp.distributed.fingerprint import Fingerprint
from vllm_dwdp.distributed.group_state import MAX_REASON, GroupState
from vllm_dwdp.distributed.messages import Step
from vllm_dwdp.distributed.status import LOOK_TIMEOUT_S, RankStatus
from vllm_dwdp.distributed.waiting import Wait
from vllm_dwdp.errors import WeightUpdateError

POLL_INTERVAL_S = 0.02

GOES_ON = (
    "Nothing was written, and this rank goes on with the weights that it has. Start the update on all "
    "ranks of the group at about the same time, with all of them running."
)
REPAIR = (
    "The ranks of the group may hold different weights, so this rank refuses to serve. Repeat the "
    "update on all ranks; if one of them has died, restart all ranks of the group, with the new "
    "checkpoint."
)


class WeightAgreement:
    """One rank's side of an update; `lock`, `agree`, `complete` and `finish` follow each other.

    Args:
        dialler: reaches the peers.
        state: what this rank answers.
        status: learns what we wait for.
        timeout_s: deadline of each wait.
    """

    def __init__(
        self, dialler: Dialler, state: GroupState, status: RankStatus, timeout_s: float
    ) -> None:
        self._dialler = dialler
        self._state = state
        self._status = status
        self._timeout_s = timeout_s
        self._starts: dict[int, int] = {}

    @property
    def update(self) -> int:
        """Number of the update that is under way, or was tried last."""
        return self._state.progress().update

    @property
    def is_under_way(self) -> bool:
        """Whether this rank pauses for an update, or takes part in one."""
        progress = self._state.progress()
        return Step.PAUSED <= progress.step < Step.DONE and not progress.failure

    @property
    def refusal(self) -> str:
        """Why this rank must not serve; empty if it may."""
        return self._state.progress().failure

    def lock(self, check: Callable[[], None] = lambda: None) -> None:
        """Return once every rank of the group has paused for the same update; this one must have.

        Args:
            check: called when all have paused and none can write yet; raises if this rank cannot take
                new weights.

        Raises:
            WeightUpdateError: one has not. The sentence says whether this rank may go on as it was.
        """
        before = self._state.progress()
        self._let_peers_finish(before.update)
        self._starts = {}
        self._go_to(before.update + 1, Step.PAUSED)
        try:
            self._wait(Step.PAUSED, "pause for new weights")
            self._check(check)
            self._go_to(self.update, Step.LOCKED)
            self._wait(Step.LOCKED, "lock their experts")
        except _NothingWritten as error:
            step = Step.UNABLE if error.starts else Step.WITHDRAWN
            self._go_to(self.update, step, proof=error.starts, failure=before.failure)
            advice = GOES_ON if not before.failure else REPAIR
            raise WeightUpdateError(
                f"the update of the weights was not begun: {str(error).rstrip(' .')}. {advice}"
            ) from None
        except BaseException as error:
            self.fail(error)
            raise WeightUpdateError(self.refusal) from error
        self._state.begin_update()

    def agree(self, proof: bytes) -> None:
        """Return once every rank has written its experts, from the same weights.

        Args:
            proof: a digest of the weights and of their layout.

        Raises:
            WeightUpdateError: a rank has written other weights, has failed, or takes too long.
        """
        self._go_to(self.update, Step.WRITTEN, proof=proof)
        for rank, peer in self._wait(Step.WRITTEN, "write their experts").items():
            if peer.proof != proof:
                raise WeightUpdateError(
                    f"rank {rank} of group {self._dialler.group} has written other weights than this "
                    f"one: their digests are {peer.proof.hex()[:12]} there and {proof.hex()[:12]} here. "
                    "Send every rank the same"
                )

    def complete(self, digest: bytes) -> Mapping[int, messages.Progress]:
        """Return once every rank's shard is whole; what they say of it, by rank.

        Args:
            digest: of all of our shard, which is whole.

        Raises:
            WeightUpdateError: a rank has failed or takes too long.
        """
        proof = self._state.progress().proof
        generation = max(time.time_ns(), self._dialler.generation + 1)
        self._go_to(self.update, Step.WHOLE, proof=proof, generation=generation, digest=digest)
        return self._wait(Step.WHOLE, "complete their shared pages")

    def finish(
        self, fingerprint: Fingerprint, layout: bytes, peers: Mapping[int, messages.Progress]
    ) -> None:
        """Serve, lend and return with the new weights from now on.

        Args:
            fingerprint: of a rank that starts with these weights.
            layout: identity of what lies in the shards of the group.
            peers: what `complete` returned.
        """
        self._dialler.fingerprint = fingerprint
        self._state.end_update(fingerprint, layout, peers)
        # Proof, digest and generation stay: a peer may ask for them only now.
        self._state.set_progress(msgspec.structs.replace(self._state.progress(), step=Step.DONE))

    def fail(self, error: BaseException, last: str = "") -> None:
        """Refuse to serve until a later update or a new start, and tell every peer that asks.

        Args:
            last: name of the tensor that came last; shown of an error that says nothing itself.
        """
        wordless = type(error).__name__ + (
            f" (the tensor that came last is {last})" if last else ""
        )
        said = (str(error) or wordless).removesuffix(REPAIR).removesuffix(GOES_ON)
        said = said[:MAX_REASON].rstrip(" .")
        reason = (
            f"the update of the weights failed on rank {self._dialler.dwdp_rank}: {said}. {REPAIR}"
        )
        progress = self._state.progress()
        self._go_to(progress.update, progress.step, failure=reason)

    def _go_to(
        self,
        update: int,
        step: Step,
        *,
        proof: bytes = b"",
        generation: int = 0,
        digest: bytes = b"",
        failure: str = "",
    ) -> None:
        self._state.set_progress(
            messages.Progress(
                started=self._dialler.generation,
                update=update,
                step=step,
                proof=proof,
                generation=generation,
                digest=digest,
                failure=failure,
            )
        )

    def _let_peers_finish(self, update: int) -> None:
        """Say how the last update ended for this rank until every peer has heard it, or is dead."""
        dialler, deadline = self._dialler, time.monotonic() + self._timeout_s
        for rank in dialler.peer_ranks:
            while time.monotonic() < deadline:
                peer = dialler.follow(rank)
                is_behind = peer is not None and peer.update == update and not peer.failure
                if peer is None or not is_behind or not Step.LOCKED <= peer.step < Step.DONE:
                    break
                time.sleep(POLL_INTERVAL_S)

    def _wait(self, step: Step, purpose: str) -> dict[int, messages.Progress]:
        """Return what every peer says once all have come as far as `step`."""
        dialler = self._dialler
        who = f"DWDP rank {dialler.dwdp_rank} of group {dialler.group}"
        wait = Wait(who, dialler.peer_ranks, purpose, self._timeout_s)
        self._status.doing = dialler.wait = wait
        reached: dict[int, messages.Progress] = {}
        try:
            while wait.missing:
                for rank in sorted(wait.missing):
                    peer = self._hear(rank, step)
                    if peer is not None:
                        reached[rank] = peer
                        wait.missing -= {rank}
                if step is Step.PAUSED and any(
                    peer.update != self.update for peer in reached.values()
                ):  # this rank has taken a later number, which every peer must confirm
                    wait.missing, reached = frozenset(dialler.peer_ranks), {}
                if wait.missing and wait.left_s < 0:
                    raise self._missed(
                        step,
                        f"ranks {sorted(wait.missing)} of group {dialler.group} did not {purpose} "
                        f"within dwdp join_timeout_s={self._timeout_s:g}",
                    )
                wait.notice()
                if wait.missing:
                    time.sleep(POLL_INTERVAL_S)
        finally:
            dialler.wait = None
            self._status.doing = "has new weights"
        return reached

    def _check(self, check: Callable[[], None]) -> None:
        """Call `check` once all have paused.

        Raises:
            _NothingWritten: it failed.
        """
        try:
            check()
        except Exception as error:
            started = (self._dialler.generation, *self._starts.values())
            raise _NothingWritten(
                str(error) or type(error).__name__, b"".join(map(_start, started))
            ) from error

    def _hear(self, rank: int, step: Step) -> messages.Progress | None:
        """Return what a peer says if it has come as far as `step`, else None.

        Raises:
            WeightUpdateError: it never will.
        """
        peer, name = self._dialler.follow(rank), f"rank {rank} of group {self._dialler.group}"
        if peer is None:
            group = self._dialler.group
            if rank in self._dialler.endpoint.listening(group, [rank], LOOK_TIMEOUT_S):
                return None
            raise self._missed(step, f"{name} is dead")
        if self._starts.setdefault(rank, peer.started) != peer.started:
            raise self._missed(step, f"{name} has restarted meanwhile")
        knows_us = peer.update == self.update and _start(self._dialler.generation) in peer.proof
        if peer.step == Step.UNABLE and knows_us:
            raise _NothingWritten(f"{name} cannot take them", peer.proof)
        is_under_way = Step.PAUSED <= peer.step <= Step.WHOLE and not peer.failure
        if step is Step.PAUSED and (late := peer.update - self.update + (not is_under_way)) > 0:
            # It has counted updates that this rank has not seen, or not begun.
            self._go_to(self.update + late, Step.PAUSED)
        if peer.update != self.update:
            return None
        if peer.step == Step.WITHDRAWN:
            raise _NothingWritten(f"{name} withdrew from it")
        if peer.failure:
            raise self._missed(step, f"{name}: {peer.failure.removesuffix(REPAIR).strip(' .')}")
        return peer if peer.step >= step else None

    def _missed(self, step: Step, why: str) -> WeightUpdateError:
        return _NothingWritten(why) if step is Step.PAUSED else WeightUpdateError(why)


class _NothingWritten(WeightUpdateError):
    """The update ends before any rank can have written.

    Args:
        starts: of all ranks, if they had all paused and one of them cannot take the new weights. Then it
            ends for all of them, also for one that has not seen yet that all had.
    """

    def __init__(self, text: str, starts: bytes = b"") -> None:
        super().__init__(text)
        self.starts = starts


def _start(generation: int) -> bytes:
    return generation.to_bytes(8, "little")

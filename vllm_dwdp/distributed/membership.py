"""How the ranks of a group meet, stay known to each other, and find each other again.

Each rank runs one daemon thread that answers requests at any time, also while the engine serves, so
a restarted peer finds everything it needs at the survivors. Dialling happens in the caller's thread,
only while it starts. Every wait has a deadline and names who is missing.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import msgspec

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.dialling import Dialler
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.exchange import ShardExchange
from vllm_dwdp.distributed.fingerprint import Fingerprint
from vllm_dwdp.distributed.group_state import GroupState
from vllm_dwdp.distributed.published_shard import PeerState, PublishedShard, duplicates
from vllm_dwdp.distributed.returning import Return
from vllm_dwdp.distributed.server import Server
from vllm_dwdp.distributed.status import RankStatus
from vllm_dwdp.distributed.weight_agreement import WeightAgreement
from vllm_dwdp.errors import RendezvousError


class Membership:
    """One rank's side of its group, answering from `join` until `close`.

    A context manager: leaving it with an error tells the peers why, so that they stop waiting. The
    peers keep what they have mapped in any case.

    Args:
        dialler: reaches the peers.
        state: what we know of them; owned by `resources`.
        status: what we say of ourselves.
        returning: what the peers had of our earlier starts when we joined.
        exchange: gets the shards of the peers.
        weights: agrees with the peers on new weights.
        resources: everything that `close` closes.
    """

    def __init__(
        self,
        dialler: Dialler,
        state: GroupState,
        status: RankStatus,
        returning: Return,
        exchange: ShardExchange,
        weights: WeightAgreement,
        resources: ExitStack,
    ) -> None:
        self.returning = returning
        self.weights = weights
        self._dialler = dialler
        self._state = state
        self._status = status
        self._exchange = exchange
        self._resources = resources

    @classmethod
    def join(
        cls,
        endpoint: Endpoint,
        *,
        group: int,
        dwdp_rank: int,
        group_size: int,
        fingerprint: Fingerprint,
        join_timeout_s: float,
    ) -> "Membership":
        """Listen, answer in a daemon thread from now on, and ask the peers what they have of us.

        Args:
            endpoint: where the ranks meet.
            group: number of the group within the deployment.
            dwdp_rank: our position in the group.
            group_size: ranks of the group.
            fingerprint: what every peer must equal.
            join_timeout_s: deadline of `meet` and of `wait_ready`.

        Raises:
            RendezvousError: a live process already is this rank, or the endpoint cannot be used.
            PeerMismatchError: a peer serves another model, layout or version.
            SecretMismatchError: a peer has another secret.
        """
        dialler = Dialler(
            endpoint,
            group=group,
            dwdp_rank=dwdp_rank,
            group_size=group_size,
            fingerprint=fingerprint,
        )
        state = GroupState(dwdp_rank, group_size, fingerprint)
        status = RankStatus(dialler, state)
        with ExitStack() as undo:
            undo.callback(state.close)
            _begin_to_answer(dialler, state, status, undo)
            undo.push(dialler.tell_failure)
            returning = Return.ask(dialler)
            exchange = ShardExchange(dialler, state, status, join_timeout_s)
            weights = WeightAgreement(dialler, state, status, join_timeout_s)
            return cls(dialler, state, status, returning, exchange, weights, undo.pop_all())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._resources.__exit__(kind, error, trace)

    def close(self) -> None:
        """Stop answering; what peers have mapped stays theirs. Idempotent."""
        self._resources.close()

    @property
    def dwdp_rank(self) -> int:
        """Our position in the group."""
        return self._dialler.dwdp_rank

    @property
    def generation(self) -> int:
        """When this rank started, in ns; later than any start of it that its peers have seen."""
        return self._dialler.generation

    @property
    def peer_ranks(self) -> tuple[int, ...]:
        """The other ranks, starting after our own."""
        return self._dialler.peer_ranks

    def describe_by(self, provider: Callable[[], dict[str, Any]]) -> None:
        """From now on the status also says what `provider` returns.

        `state` is `starting` until the provider says otherwise; `doing` says what that waits for.
        """
        self._status.provider = provider

    def status(self) -> dict[str, Any]:
        """Return the answer to a status request, as JSON."""
        return self._status.content()

    def peers(self) -> dict[int, PeerState]:
        """Each peer's state now; a met peer that no longer listens is dead."""
        return self._status.peers()

    def recover(self) -> Iterator[PublishedShard]:
        """Our own shard of an earlier start, as each lender holds it whole; the caller owns them.

        Raises:
            PeerMismatchError: a lender refuses us.
        """
        return self.returning.shards(self._dialler)

    def publish(
        self,
        fds: Sequence[int],
        handle_bytes: Sequence[int],
        fabric_handles: Sequence[bytes] = (),
        layout: bytes = b"",
    ) -> None:
        """Hand our shard to every peer that asks; `fds` stay the caller's.

        Args:
            layout: identity of what lies in the shards of the group; peers compare it.

        Raises:
            RendezvousError: it has more handles than peers accept, none that can travel to them, or
                they cannot be duplicated.
        """
        self._check_handles(max(len(fds), len(fabric_handles)), handle_bytes, bool(fabric_handles))
        shard = PublishedShard(
            rank=self.dwdp_rank,
            generation=self.generation,
            fds=duplicates(fds) if self._dialler.endpoint.carries_fds else (),
            fabric_handles=tuple(fabric_handles),
            handle_bytes=tuple(handle_bytes),
            layout=layout,
            digest=b"",
            ready=False,
        )
        self._state.publish(shard)

    def _check_handles(self, count: int, handle_bytes: Sequence[int], is_fabric: bool) -> None:
        """Check that a shard of `count` handles can be handed over here."""
        if count > messages.MAX_HANDLES:
            raise RendezvousError(
                f"this rank's shard has {count} memory handles; at most {messages.MAX_HANDLES} can "
                "be handed over. Use more ranks per group."
            )
        endpoint = self._dialler.endpoint
        if not endpoint.carries_fds and any(handle_bytes) and not is_fabric:
            raise RendezvousError(
                f"this rank's shard has no CUDA fabric handles, and nothing else can be handed over "
                f"at {endpoint}. Use unix:///folder for the ranks of one host."
            )

    def propose_limit(self, limit: int | None) -> None:
        """Say with `announce_ready` up to which step this rank would read in place; None: no choice."""
        self._state.propose_limit(limit)

    def agree_on_limit(self) -> int | None:
        """Return the limit of the group, once `wait_ready` has returned; waits for no rank."""
        return self._state.agree_on_limit()

    def learn_update(self) -> int:
        """Return the number of the group's last update of weights, once `wait_ready` has returned."""
        return self._state.learn_update()

    def held(self) -> dict[int, PublishedShard]:
        """Return the shards of the peers, with descriptors of the caller's own."""
        return {rank: shard.duplicate() for rank, shard in self._state.held().items()}

    @property
    def fingerprint(self) -> Fingerprint:
        """What every peer equals now."""
        return self._state.fingerprint

    def announce_ready(self, digest: bytes) -> None:
        """Let peers map every page: our edge pages are whole, and `digest` covers all of the shard."""
        self._state.announce_ready(digest)

    def meet(self) -> dict[int, PublishedShard]:
        """Wait for every peer's shard; as `ShardExchange.meet`."""
        return self._exchange.meet()

    def wait_ready(self) -> dict[int, PublishedShard]:
        """Wait until every peer's pages are whole; as `ShardExchange.wait_ready`."""
        return self._exchange.wait_ready()


def _begin_to_answer(
    dialler: Dialler, state: GroupState, status: RankStatus, undo: ExitStack
) -> None:
    """Listen, and answer the peers in a daemon thread until `undo` closes both.

    Raises:
        RendezvousError: a live process already is this rank, or the endpoint cannot be used.
    """
    endpoint, group, dwdp_rank = dialler.endpoint, dialler.group, dialler.dwdp_rank
    server = Server(
        undo.enter_context(endpoint.listen(group, dwdp_rank)),
        lambda sock: endpoint.greet(sock, group, dwdp_rank),
        functools.partial(_answer, dialler, state, status),
        status.note_dropped,
        f"rank {dwdp_rank} of group {group}",
    )
    undo.callback(server.close)


def _answer(
    dialler: Dialler, state: GroupState, status: RankStatus, request: messages.Request
) -> list[messages.Packet]:
    """Answer one request (in the server's thread)."""
    if isinstance(request, messages.StatusRequest):
        return [(messages.Status(status.content()), ())]
    if isinstance(request, messages.Keep):
        return state.answer_holder(request)
    if isinstance(request, messages.Renewed):
        return [(state.answer_newcomer(), ())]
    if isinstance(request, messages.Follow):
        progress = msgspec.structs.replace(state.progress(), started=dialler.generation)
        return [(progress, ())]
    return state.answer(request)

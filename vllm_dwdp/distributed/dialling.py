"""One exchange with a peer: a request, its reply, and how long that may take.

Runs in the thread that starts the rank; the answering thread never dials.
"""

import time
from contextlib import suppress
from dataclasses import dataclass, field

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.connection import Connection
from vllm_dwdp.distributed.endpoint import Endpoint, name_of
from vllm_dwdp.distributed.fingerprint import Fingerprint
from vllm_dwdp.distributed.group_state import MAX_REASON, ranks_after
from vllm_dwdp.distributed.published_shard import PublishedShard
from vllm_dwdp.distributed.waiting import Wait
from vllm_dwdp.errors import DwdpError, PeerMismatchError, ProtocolError

REPLY_TIMEOUT_S = 5.0
"""The longest that one exchange with a peer takes, whole."""
SHORTEST_TIMEOUT_S = 0.5
"""The same where `join_timeout_s` has nearly passed."""


@dataclass
class _Answer:
    """A reply and, of a shard that was asked for with its handles, these."""

    reply: messages.Reply
    fds: list[int] = field(default_factory=list)
    fabric_handles: list[bytes] = field(default_factory=list)


def ask_once(
    endpoint: Endpoint, group: int, rank: int, request: messages.Request, timeout_s: float
) -> messages.Reply | None:
    """Ask a rank without being one of its group; None if no process listens in its place.

    Raises:
        OSError: it dies meanwhile, or takes too long.
        RendezvousError: what listens there is not that rank, or its answer is no message.
    """
    connection = endpoint.connect(group, rank, timeout_s)
    if connection is None:
        return None
    with connection:
        return _ask(connection, request)


def _ask(connection: Connection, request: messages.Request) -> messages.Reply:
    """Send a request and return the reply; of descriptors that come with it none is kept."""
    connection.send_message(request)
    reply, stray = connection.receive_reply()
    messages.close_all(stray)
    return reply


class Dialler:
    """How a rank reaches its peers, and what it introduces itself with.

    Args:
        endpoint: where the ranks meet.
        group: number of the group within the deployment.
        dwdp_rank: our position in the group.
        group_size: ranks of the group.
        fingerprint: what every peer must equal.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        group: int,
        dwdp_rank: int,
        group_size: int,
        fingerprint: Fingerprint,
    ) -> None:
        self.endpoint = endpoint
        self.group = group
        self.dwdp_rank = dwdp_rank
        self.group_size = group_size
        self.fingerprint = fingerprint
        self.generation = time.time_ns()
        self.wait: Wait | None = None
        """The wait that asks, which bounds every exchange."""
        self.problems: dict[int, str] = {}
        """Why the last exchange with a peer failed, by its rank."""

    @property
    def peer_ranks(self) -> tuple[int, ...]:
        """The other ranks, starting after our own."""
        return ranks_after(self.dwdp_rank, self.group_size)

    @property
    def lenders(self) -> tuple[int, ...]:
        """Who may have a shard that is not theirs: the other ranks, then a holder."""
        return (*self.peer_ranks, *self.endpoint.holders)

    def ask(self, peer: int, wanted: int) -> messages.Reply | None:
        """Ask `peer` how far the shard of `wanted` is; None if it does not answer (yet)."""
        answer = self._exchange(peer, self._request(peer, wanted, wants_handles=False))
        return None if answer is None else answer.reply

    def follow(self, peer: int) -> messages.Progress | None:
        """Ask `peer` how far it is with new weights; None if it does not answer (yet)."""
        answer = self._exchange(peer, messages.Follow(self.dwdp_rank))
        reply = None if answer is None else answer.reply
        return reply if isinstance(reply, messages.Progress) else None

    def fetch(self, peer: int, wanted: int) -> PublishedShard | None:
        """Get the shard of `wanted` as `peer` has it, owned by the caller, or None.

        Raises:
            PeerMismatchError: the peer refuses us.
            ProtocolError: what it sent is not that shard.
        """
        answer = self._exchange(peer, self._request(peer, wanted, wants_handles=True))
        if answer is None:
            return None
        reply = answer.reply
        self.raise_refusal(peer, reply)
        if not isinstance(reply, messages.Shard):
            return None
        try:
            _check_shard(answer, reply, peer, wanted)
        except ProtocolError:
            messages.close_all(answer.fds)
            raise
        return PublishedShard(
            rank=wanted,
            generation=reply.generation,
            fds=tuple(answer.fds),
            fabric_handles=tuple(answer.fabric_handles),
            handle_bytes=reply.handle_bytes,
            layout=reply.layout,
            digest=reply.digest,
            ready=reply.ready,
            direct_limit=reply.direct_limit,
            limit_in_force=reply.limit_in_force,
            update=reply.update,
            is_lent=peer != wanted,
        )

    def tell_failure(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Let peers that wait for us stop waiting, if there is an error; best effort.

        A holder may learn that no rank can start with what it holds.

        The arguments are those of `__exit__`.
        """
        if error is None:
            return
        reason = f"{type(error).__name__}: {error}"[:MAX_REASON]
        message = messages.Failed(self.dwdp_rank, self.generation, reason)
        for peer in self.lenders:
            with suppress(OSError, DwdpError):
                self._exchange(peer, message)

    def raise_refusal(self, peer: int, reply: messages.Reply | None) -> None:
        """Raise what a peer refused us for.

        Raises:
            PeerMismatchError: it did.
        """
        if isinstance(reply, messages.Refused):
            raise PeerMismatchError(f"{name_of(peer)} of group {self.group}: {reply.reason}")

    def _request(self, peer: int, wanted: int, *, wants_handles: bool) -> messages.Request:
        """Return the request to `peer` for the shard of `wanted`: its own, or one that it holds."""
        ours = (self.dwdp_rank, self.generation, self.fingerprint)
        if peer == wanted:
            return messages.Hello(*ours, wants_handles)
        return messages.Borrow(*ours, wanted, wants_handles)

    def _exchange(self, peer: int, request: messages.Request) -> _Answer | None:
        """Dial, ask, hear the whole answer, close; None if the peer does not answer (yet)."""
        timeout_s = REPLY_TIMEOUT_S
        if self.wait is not None:
            self.wait.notice()  # a round of many silent peers takes longer than a notice
            timeout_s = min(timeout_s, max(self.wait.left_s, SHORTEST_TIMEOUT_S))
        try:
            connection = self.endpoint.connect(self.group, peer, timeout_s)
            if connection is None:
                return None
            with connection:
                answer = _Answer(_ask(connection, request))
                if isinstance(answer.reply, messages.Shard):
                    answer.fds, answer.fabric_handles = connection.receive_handles(answer.reply)
        except (OSError, ProtocolError) as error:
            self.problems[peer] = f"{type(error).__name__}: {error}"
            return None
        self.problems.pop(peer, None)
        return answer


def _check_shard(answer: _Answer, shard: messages.Shard, peer: int, wanted: int) -> None:
    """Check that it is the shard of `wanted`, with as many handles as pieces.

    Raises:
        ProtocolError: it is not.
    """
    if shard.dwdp_rank != wanted:
        raise ProtocolError(
            f"{name_of(peer)} sent the shard of rank {shard.dwdp_rank}, not that of rank {wanted}"
        )
    kinds = (answer.fds, answer.fabric_handles)
    if {len(kind) for kind in kinds if kind} != {len(shard.handle_bytes)}:
        raise ProtocolError(
            f"{name_of(peer)} sent {len(answer.fds)} descriptors and {len(answer.fabric_handles)} "
            f"fabric handles of a shard in {len(shard.handle_bytes)} pieces"
        )

"""How the ranks of a group meet, stay known to each other, and find each other again.

Each rank runs one daemon thread that answers requests at any time, also while the engine serves, so
a restarted peer finds everything it needs at the survivors. Dialling happens in the caller's thread,
only while it starts. Every wait has a deadline and names who is missing.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.fingerprint import Fingerprint
from vllm_dwdp.distributed.group_state import MAX_REASON, GroupState
from vllm_dwdp.distributed.published_shard import (
    PeerState,
    PublishedShard,
    closed_on_error,
    duplicates,
)
from vllm_dwdp.distributed.server import Server
from vllm_dwdp.distributed.waiting import Wait
from vllm_dwdp.errors import (
    DwdpError,
    JoinTimeoutError,
    PeerMismatchError,
    ProtocolError,
    RendezvousError,
)
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)

POLL_INTERVAL_S = 0.05
REPLY_TIMEOUT_S = 5.0
"""For one exchange with a peer, whole."""
SHORTEST_TIMEOUT_S = 0.5
"""The same where `join_timeout_s` has nearly passed."""
LOOK_TIMEOUT_S = 0.25
"""For a look whether peers listen, while somebody waits for our status."""

__all__ = ["Membership", "PeerState", "PublishedShard", "query_status"]


class Membership:
    """One rank's side of its group. A context manager; `close` is idempotent.

    Args:
        endpoint: the meeting place.
        group: number of the group within the deployment.
        dwdp_rank: our position in the group.
        group_size: ranks of the group.
        fingerprint: what every peer must equal.
        join_timeout_s: deadline of `meet` and of `wait_ready`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        group: int,
        dwdp_rank: int,
        group_size: int,
        fingerprint: Fingerprint,
        join_timeout_s: float,
    ) -> None:
        self.endpoint = endpoint
        self.group = group
        self.dwdp_rank = dwdp_rank
        self.group_size = group_size
        self.fingerprint = fingerprint
        self.join_timeout_s = join_timeout_s
        self.generation = time.time_ns()
        self.status_provider: Callable[[], dict[str, Any]] = dict
        self._doing: Wait | str = "loads its experts"
        self._join_deadline = math.inf
        self._problems: dict[int, str] = {}
        self._state = GroupState(dwdp_rank, group_size, fingerprint)
        self._server: Server | None = None

    def __enter__(self) -> "Membership":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if error is not None and self._server is not None:
            self._tell_failure(error)
        self.close()

    @property
    def peer_ranks(self) -> tuple[int, ...]:
        """The other ranks, starting after our own."""
        return self._state.peer_ranks

    def start(self) -> None:
        """Listen, and answer in a daemon thread until `close`."""
        listener = self.endpoint.listen(self.group, self.dwdp_rank)
        self._server = Server(
            listener,
            lambda connection: self.endpoint.greet(connection, self.group, self.dwdp_rank),
            self._answer,
            f"dwdp-rendezvous-{self.dwdp_rank}",
        )

    def close(self) -> None:
        """Stop answering; what peers have mapped stays theirs."""
        if self._server is not None:
            server, self._server = self._server, None
            server.close()
        self._state.close()

    def kept_bytes(self) -> int:
        """Bytes of our shard of an earlier life, if a peer holds it whole; may be asked before `start`.

        Raises:
            PeerMismatchError: as `recover`.
        """
        self._outlive_earlier_starts()
        for rank in self.peer_ranks:
            reply = self._ask(rank, self._borrowing(self.dwdp_rank, wants_handles=False))
            self._raise_refusal(rank, reply)
            if isinstance(reply, messages.Shard):
                return sum(reply.handle_bytes)
        return 0

    def recover(self) -> Iterator[PublishedShard]:
        """Our own shard of an earlier life, as each peer holds it whole; the caller owns them.

        Call before `publish`: a clock that was set back must not make us look like our past.

        Raises:
            PeerMismatchError: a peer serves another model, layout or version.
        """
        self._outlive_earlier_starts()
        for rank in self.peer_ranks:
            shard = self._ask_for_shard(rank, self._borrowing(self.dwdp_rank), self.dwdp_rank)
            if shard is not None:
                yield shard

    def _outlive_earlier_starts(self) -> None:
        """Take a later generation than any that the peers have seen of us."""
        for rank in self.peer_ranks:
            reply = self._ask(rank, self._borrowing(self.dwdp_rank, wants_handles=False))
            if isinstance(reply, messages.Refused) and reply.seen_generation > self.generation:
                logger.warning(
                    "DWDP rank %d: the clock of this host is behind an earlier start of this rank",
                    self.dwdp_rank,
                )
                self.generation = reply.seen_generation + 1

    def publish(
        self,
        fds: Sequence[int],
        handle_bytes: Sequence[int],
        fabric_handles: Sequence[bytes] = (),
        layout: bytes = b"",
    ) -> None:
        """Hand our shard to whoever asks; `fds` stay the caller's.

        Args:
            layout: identity of what lies in the shards of the group; peers compare it.

        Raises:
            RendezvousError: it has more handles than peers accept, none that can travel to them, or
                they cannot be duplicated.
        """
        if max(len(fds), len(fabric_handles)) > messages.MAX_HANDLES:
            raise RendezvousError(
                f"this rank's shard has {max(len(fds), len(fabric_handles))} memory handles; at "
                f"most {messages.MAX_HANDLES} can be handed over. Use more ranks per group."
            )
        if not self.endpoint.carries_fds and any(handle_bytes) and not fabric_handles:
            raise RendezvousError(
                f"this rank's shard has no CUDA fabric handles, and nothing else can be handed over "
                f"at {self.endpoint}. Use unix:///folder for the ranks of one host."
            )
        shard = PublishedShard(
            rank=self.dwdp_rank,
            generation=self.generation,
            fds=duplicates(fds) if self.endpoint.carries_fds else (),
            fabric_handles=tuple(fabric_handles),
            handle_bytes=tuple(handle_bytes),
            layout=layout,
            digest=b"",
            ready=False,
        )
        self._state.publish(shard)

    def announce_ready(self, digest: bytes) -> None:
        """Our edge pages are whole: every page of our shard may be mapped. `digest` covers it all."""
        self._state.announce_ready(digest)

    def meet(self) -> dict[int, PublishedShard]:
        """Every peer's shard, by rank; the caller owns them.

        Raises:
            JoinTimeoutError: peers did not publish in time; names them.
            PeerMismatchError: a peer has another model, layout or version.
            SecretMismatchError: a peer has another secret.
            RendezvousError: a peer gave up its start; quotes its reason.
        """
        shards: dict[int, PublishedShard] = {}
        with closed_on_error(shards):
            self._poll_peers(lambda rank: self._fetch(rank, shards), "publish their experts")
        self._doing = "maps the experts of its peers"
        return shards

    def wait_ready(self) -> dict[int, PublishedShard]:
        """Return when every peer's pages are whole.

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
        self._doing = "binds its experts"
        return replaced

    def peers(self) -> dict[int, PeerState]:
        """Each peer's state now; a met peer that no longer listens is dead."""
        held = self._state.held()
        alive = self.endpoint.listening(self.group, held, LOOK_TIMEOUT_S)
        return self._state.peer_states(held, alive)

    def status(self) -> dict[str, Any]:
        """Our status as JSON: what we are and do, the peers, and what `status_provider` adds.

        `state` is `starting` until the provider says otherwise; `doing` says what that waits for.
        """
        failed_at, failure = self._state.last_failure
        facts: dict[str, Any] = {
            "group": self.group,
            "group_size": self.group_size,
            "dwdp_rank": self.dwdp_rank,
            "generation": self.generation,
            "state": "starting",
            "doing": str(self._doing),
            "last_failure": failure,
            "last_failure_at": failed_at,
            "dropped_connections": self._server.num_dropped if self._server else 0,
        }
        facts |= self.status_provider()
        if "peers" not in facts:
            facts["peers"] = {str(rank): state.state for rank, state in self.peers().items()}
        if facts["state"] != "starting":
            del facts["doing"]
        return facts

    def _poll_peers(self, step: Callable[[int], bool], purpose: str) -> None:
        """Call `step(rank)` for every peer until all returned true, or the deadline passed."""
        who = f"DWDP rank {self.dwdp_rank} of group {self.group}"
        self._doing = wait = Wait(who, self.peer_ranks, purpose, self.join_timeout_s)
        self._join_deadline = time.monotonic() + self.join_timeout_s
        while True:
            for rank in sorted(wait.missing):
                if step(rank):
                    wait.missing -= {rank}
            if not wait.missing:
                return
            self._state.raise_failures(self.group)
            if time.monotonic() > self._join_deadline:
                raise self._timeout(sorted(wait.missing), purpose)
            wait.notice()
            time.sleep(POLL_INTERVAL_S)

    def _timeout(self, missing: list[int], purpose: str) -> JoinTimeoutError:
        seen = "".join(
            f" Rank {rank} answered last: {self._problems[rank]}."
            for rank in missing
            if rank in self._problems
        )
        return JoinTimeoutError(
            f"ranks {missing} of group {self.group} did not {purpose} within dwdp "
            f"join_timeout_s={self.join_timeout_s:g} (this is rank {self.dwdp_rank} of "
            f"{self.group_size}, meeting at {self.endpoint}).{seen} Check that those ranks were "
            "started with the same rendezvous and did not fail, or raise join_timeout_s."
        )

    def _fetch(self, rank: int, shards: dict[int, PublishedShard]) -> bool:
        """Get the shard of `rank`: from itself, or, if it is dead, from a peer that holds it."""
        shard = self._ask_for_shard(rank, self._hello(), rank)
        holders = [peer for peer in self.peer_ranks if peer != rank]
        while shard is None and holders:
            shard = self._ask_for_shard(holders.pop(0), self._borrowing(rank), rank)
        if shard is None:
            return False
        if rank in shards:
            shards[rank].close()
        shards[rank] = shard
        self._state.hold(shard.duplicate())
        return True

    def _is_ready(self, rank: int, replaced: dict[int, PublishedShard]) -> bool:
        """Whether the shard of `rank` that we hold is whole; if it has another now, fetch that."""
        held = self._state.held()[rank]
        if held.ready:
            return True
        answers = [self._ask(rank, self._hello(wants_handles=False))]
        if answers[0] is None:
            answers = [
                self._ask(holder, self._borrowing(rank, wants_handles=False))
                for holder in self.peer_ranks
                if holder != rank
            ]
        for answer in answers:
            self._raise_refusal(rank, answer)
            if not isinstance(answer, messages.Shard):
                continue
            if answer.generation != held.generation:
                return self._fetch(rank, replaced) and replaced[rank].ready
            if answer.ready:
                self._state.mark_whole(rank, answer.digest)
                return True
        return False

    def _hello(self, wants_handles: bool = True) -> messages.Hello:
        return messages.Hello(self.dwdp_rank, self.generation, self.fingerprint, wants_handles)

    def _borrowing(self, wanted: int, wants_handles: bool = True) -> messages.Borrow:
        return messages.Borrow(
            self.dwdp_rank, self.generation, self.fingerprint, wanted, wants_handles
        )

    def _ask_for_shard(
        self, rank: int, request: messages.Request, wanted: int
    ) -> PublishedShard | None:
        """The shard of `wanted` as `rank` has it, or None."""
        handles: tuple[list[int], list[bytes]] = ([], [])
        reply = self._ask(rank, request, handles)
        self._raise_refusal(rank, reply)
        if not isinstance(reply, messages.Shard):
            return None
        if reply.dwdp_rank != wanted:
            messages.close_all(handles[0])
            raise ProtocolError(f"rank {rank} sent the shard of {reply.dwdp_rank}, not {wanted}'s")
        if {len(kind) for kind in handles if kind} != {len(reply.handle_bytes)}:
            messages.close_all(handles[0])
            raise ProtocolError(
                f"rank {rank} sent {len(handles[0])} descriptors and {len(handles[1])} fabric handles "
                f"of a shard in {len(reply.handle_bytes)} pieces"
            )
        return PublishedShard(
            rank=wanted,
            generation=reply.generation,
            fds=tuple(handles[0]),
            fabric_handles=tuple(handles[1]),
            handle_bytes=reply.handle_bytes,
            layout=reply.layout,
            digest=reply.digest,
            ready=reply.ready,
            is_lent=rank != wanted,
        )

    def _raise_refusal(self, rank: int, reply: messages.Reply | None) -> None:
        if isinstance(reply, messages.Refused):
            raise PeerMismatchError(f"rank {rank} of group {self.group}: {reply.reason}")

    def _ask(
        self,
        rank: int,
        message: messages.Request,
        handles: tuple[list[int], list[bytes]] | None = None,
    ) -> messages.Reply | None:
        """One exchange with a peer; None if it does not answer (yet).

        Args:
            handles: filled with those that follow a shard; without it none are expected.
        """
        if isinstance(self._doing, Wait):
            self._doing.notice()  # a round of many silent peers takes longer than a notice
        left_s = self._join_deadline - time.monotonic()
        timeout_s = min(REPLY_TIMEOUT_S, max(left_s, SHORTEST_TIMEOUT_S))
        try:
            connection = self.endpoint.connect(self.group, rank, timeout_s)
            if connection is None:
                return None
            with connection:
                connection.send_message(message)
                reply, stray = connection.receive_reply()
                messages.close_all(stray)
                if isinstance(reply, messages.Shard) and handles is not None:
                    fds, fabric_handles = connection.receive_handles(reply)
                    handles[0].extend(fds)
                    handles[1].extend(fabric_handles)
        except (OSError, ProtocolError) as error:
            self._problems[rank] = f"{type(error).__name__}: {error}"
            return None
        self._problems.pop(rank, None)
        return reply

    def _tell_failure(self, error: BaseException) -> None:
        """Let peers that wait for us stop waiting; best effort."""
        reason = f"{type(error).__name__}: {error}"[:MAX_REASON]
        message = messages.Failed(self.dwdp_rank, self.generation, reason)
        for rank in self.peer_ranks:
            with suppress(OSError, DwdpError):
                self._ask(rank, message)

    def _answer(self, request: messages.Request) -> list[messages.Packet]:
        """Answer one request (in the server's thread)."""
        if isinstance(request, messages.StatusRequest):
            return [(messages.Status(self.status()), ())]
        return self._state.answer(request)


def query_status(endpoint: Endpoint, group: int, rank: int, timeout_s: float) -> dict[str, Any]:
    """Ask a rank how it is.

    Raises:
        RendezvousError: nobody listens there, or the answer is no status.
    """
    connection = endpoint.connect(group, rank, timeout_s)
    if connection is None:
        raise RendezvousError(f"rank {rank} of group {group} does not listen at {endpoint}")
    with connection:
        connection.send_message(messages.StatusRequest())
        reply, stray = connection.receive_reply()
    messages.close_all(stray)
    if not isinstance(reply, messages.Status):
        raise RendezvousError(f"rank {rank} of group {group} answered {type(reply).__name__}")
    return reply.content

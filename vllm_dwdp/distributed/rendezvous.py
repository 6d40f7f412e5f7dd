"""How the ranks of a group meet, stay known to each other, and find each other again.

Each rank runs one daemon thread that answers requests at any time, also while the engine serves, so
a restarted peer finds everything it needs at the survivors. Dialling happens in the caller's thread,
only while it starts. Every wait has a deadline and names who is missing.
"""

import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.fingerprint import Fingerprint, describe
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
CONNECTION_DEADLINE_S = 5.0
MAX_CONNECTIONS = 256
WAITING_NOTICE_S = 10.0
_UCRED = struct.Struct("3i")


@dataclass(frozen=True, kw_only=True)
class PeerShard:
    """A peer's shard as it was handed to us. Whoever receives it owns `fd`."""

    peer_rank: int
    generation: int
    fd: int
    num_bytes: int
    digest: bytes
    ready: bool


@dataclass(frozen=True)
class PeerState:
    """What we know of a peer: `missing`, `published`, `ready` or `dead`."""

    state: str
    generation: int


@dataclass
class _Published:
    fd: int
    num_bytes: int
    digest: bytes = b""
    ready: bool = False


@dataclass
class _Known:
    """Shared between the caller and the answering thread; guarded by `Rendezvous._lock`.

    `held` are the whole shards of peers, each with an fd of our own.
    """

    published: _Published | None = None
    held: dict[int, PeerShard] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    refusals: dict[int, str] = field(default_factory=dict)
    generations: dict[int, int] = field(default_factory=dict)
    met: dict[int, bool] = field(default_factory=dict)


class Rendezvous:
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
        self._known = _Known()
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def __enter__(self) -> "Rendezvous":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if error is not None and self._server is not None:
            self._tell_failure(error)
        self.close()

    @property
    def peer_ranks(self) -> tuple[int, ...]:
        """The other ranks, starting after our own."""
        return tuple(
            (self.dwdp_rank + step) % self.group_size for step in range(1, self.group_size)
        )

    def start(self) -> None:
        """Listen, and answer in a daemon thread until `close`."""
        listener = self.endpoint.listen(self.group, self.dwdp_rank)
        self._server = _Server(listener, self._answer, f"dwdp-rendezvous-{self.dwdp_rank}")

    def close(self) -> None:
        """Stop answering; what peers have mapped stays theirs."""
        if self._server is not None:
            server, self._server = self._server, None
            server.close()
            self.endpoint.forget(self.group, self.dwdp_rank)
        with self._lock:
            known, self._known = self._known, _Known()
        for shard in (known.published, *known.held.values()):
            if shard is not None:
                os.close(shard.fd)

    def recover(self) -> PeerShard | None:
        """Our own shard of an earlier life, if a peer still holds it whole; the caller owns its fd.

        Raises:
            PeerMismatchError: a peer serves another model, layout or version.
        """
        for rank in self.peer_ranks:
            shard = self._borrow(rank, self.dwdp_rank)
            if shard is not None:
                return shard
        return None

    def publish(self, fd: int, num_bytes: int) -> None:
        """Hand our shard to whoever asks; `fd` stays the caller's."""
        with self._lock:
            self._known.published = _Published(os.dup(fd), num_bytes)

    def announce_ready(self, digest: bytes) -> None:
        """Our edge pages are whole: every page of our shard may be mapped. `digest` covers it all."""
        with self._lock:
            published = self._known.published
            assert published is not None
            published.digest = digest
            published.ready = True

    def meet(self) -> dict[int, PeerShard]:
        """Every peer's shard, by rank; the caller owns the fds.

        Raises:
            JoinTimeoutError: peers did not publish in time; names them.
            PeerMismatchError: a peer has another model, layout or version.
            RendezvousError: a peer gave up its start; quotes its reason.
        """
        shards: dict[int, PeerShard] = {}
        try:
            self._poll_peers(lambda rank: self._fetch(rank, shards), "publish their experts")
        except BaseException:
            for shard in shards.values():
                os.close(shard.fd)
            raise
        return shards

    def wait_ready(self) -> None:
        """Return when every peer's pages are whole.

        Raises:
            JoinTimeoutError, RendezvousError: as `meet`.
        """
        self._poll_peers(self._is_ready, "complete their shared pages")

    def peers(self) -> dict[int, PeerState]:
        """Each peer's state now; a met peer that no longer listens is dead."""
        states = {}
        for rank in self.peer_ranks:
            with self._lock:
                generation = self._known.generations.get(rank, 0)
                ready = self._known.met.get(rank)
            if ready is None:
                states[rank] = PeerState("missing", generation)
                continue
            connection = self.endpoint.connect(self.group, rank, timeout_s=1.0)
            alive = connection is not None
            if connection is not None:
                connection.close()
            state = ("ready" if ready else "published") if alive else "dead"
            states[rank] = PeerState(state, generation)
        return states

    def _poll_peers(self, step: Callable[[int], bool], purpose: str) -> None:
        """Call `step(rank)` for every peer until all returned true, or the deadline passed."""
        started = noticed = time.monotonic()
        waiting = set(self.peer_ranks)
        while True:
            waiting = {rank for rank in waiting if not step(rank)}
            if not waiting:
                return
            self._raise_failures()
            now = time.monotonic()
            if now - started > self.join_timeout_s:
                raise self._timeout(sorted(waiting), purpose)
            if now - noticed > WAITING_NOTICE_S:
                noticed = now
                logger.info(
                    "DWDP rank %d of group %d waits for ranks %s to %s (%.0f s of %.0f s)",
                    self.dwdp_rank,
                    self.group,
                    sorted(waiting),
                    purpose,
                    now - started,
                    self.join_timeout_s,
                )
            time.sleep(POLL_INTERVAL_S)

    def _timeout(self, missing: list[int], purpose: str) -> JoinTimeoutError:
        return JoinTimeoutError(
            f"ranks {missing} of group {self.group} did not {purpose} within dwdp "
            f"join_timeout_s={self.join_timeout_s:g} (this is rank {self.dwdp_rank} of "
            f"{self.group_size}, meeting at {self.endpoint}). Check that those ranks were started "
            "with the same rendezvous and did not fail, or raise join_timeout_s."
        )

    def _raise_failures(self) -> None:
        with self._lock:
            failures, refusals = dict(self._known.failures), dict(self._known.refusals)
        for rank, reason in refusals.items():
            raise PeerMismatchError(f"rank {rank} of group {self.group}: {reason}")
        for rank, reason in failures.items():
            raise RendezvousError(f"rank {rank} of group {self.group} failed to start: {reason}")

    def _fetch(self, rank: int, shards: dict[int, PeerShard]) -> bool:
        """Get the shard of `rank`: from itself, or, if it is dead, from a peer that holds it."""
        shard = self._hello(rank)
        holders = [peer for peer in self.peer_ranks if peer != rank]
        while shard is None and holders:
            shard = self._borrow(holders.pop(0), rank)
        if shard is None:
            return False
        shards[rank] = shard
        with self._lock:
            self._known.generations[rank] = max(
                shard.generation, self._known.generations.get(rank, 0)
            )
        self._hold(shard)
        return True

    def _is_ready(self, rank: int) -> bool:
        with self._lock:
            if self._known.met.get(rank):
                return True
        shard = self._hello(rank)
        if shard is None:
            return False
        self._hold(shard)
        os.close(shard.fd)
        return shard.ready

    def _hold(self, shard: PeerShard) -> None:
        """Remember the peer, and keep its whole shard for others who may need it."""
        with self._lock:
            self._known.met[shard.peer_rank] = shard.ready
            if shard.ready and shard.peer_rank not in self._known.held:
                self._known.held[shard.peer_rank] = replace(shard, fd=os.dup(shard.fd))

    def _borrow(self, holder: int, wanted: int) -> PeerShard | None:
        """The whole shard of rank `wanted`, if `holder` answers and has it."""
        request = messages.Borrow(self.dwdp_rank, self.generation, self.fingerprint, wanted)
        return self._ask_for_shard(holder, request, wanted)

    def _hello(self, rank: int) -> PeerShard | None:
        """The peer's shard if it has published one."""
        request = messages.Hello(self.dwdp_rank, self.generation, self.fingerprint)
        return self._ask_for_shard(rank, request, rank)

    def _ask_for_shard(self, rank: int, request: messages.Request, wanted: int) -> PeerShard | None:
        received: list[int] = []
        reply = self._ask(rank, request, received=received)
        if isinstance(reply, messages.Shard) and len(received) == 1:
            return PeerShard(
                peer_rank=wanted,
                generation=reply.generation,
                fd=received[0],
                num_bytes=reply.num_bytes,
                digest=reply.digest,
                ready=reply.ready,
            )
        for fd in received:
            os.close(fd)
        if isinstance(reply, messages.Refused):
            raise PeerMismatchError(f"rank {rank} of group {self.group}: {reply.reason}")
        return None

    def _ask(
        self,
        rank: int,
        message: messages.Request,
        fds: tuple[int, ...] = (),
        received: list[int] | None = None,
    ) -> messages.Reply | None:
        """One exchange with a peer; None if it does not answer (yet)."""
        connection = self.endpoint.connect(self.group, rank, REPLY_TIMEOUT_S)
        if connection is None:
            return None
        with connection:
            try:
                messages.send(connection, message, fds)
                reply, reply_fds = messages.receive_reply(connection)
            except (OSError, ProtocolError) as error:
                logger.debug("rank %d does not answer: %s", rank, error)
                return None
        if received is not None:
            received.extend(reply_fds)
        else:
            for fd in reply_fds:
                os.close(fd)
        return reply

    def _tell_failure(self, error: BaseException) -> None:
        """Let peers that wait for us stop waiting; best effort."""
        reason = f"{type(error).__name__}: {error}"[:2000]
        message = messages.Failed(self.dwdp_rank, self.generation, reason)
        for rank in self.peer_ranks:
            with suppress(OSError, DwdpError):
                self._ask(rank, message)

    def _answer(
        self, request: messages.Request, fds: list[int]
    ) -> tuple[messages.Reply, int | None]:
        """Answer one request (in the server's thread): the reply and an fd to send with it."""
        if isinstance(request, messages.StatusRequest):
            return messages.Status(self.status_provider()), None
        refusal = self._refusal(request)
        if refusal is not None:
            return messages.Refused(refusal), None
        if isinstance(request, messages.Failed):
            with self._lock:
                self._known.failures[request.dwdp_rank] = request.reason
            return messages.Accepted(), None
        if isinstance(request, messages.Borrow) and request.wanted != self.dwdp_rank:
            with self._lock:
                held = self._known.held.get(request.wanted)
            if held is None:
                return messages.NotYet(), None
            return _shard_message(request.wanted, held.generation, held), held.fd
        with self._lock:
            self._known.failures.pop(request.dwdp_rank, None)
            published = self._known.published
        if published is None:
            return messages.NotYet(), None
        return _shard_message(self.dwdp_rank, self.generation, published), published.fd

    def _refusal(self, request: messages.Request) -> str | None:
        """Why we do not talk to this peer, or None. Remembers its generation."""
        assert not isinstance(request, messages.StatusRequest)
        rank = request.dwdp_rank
        if rank not in self.peer_ranks:
            return f"there is no rank {rank} besides rank {self.dwdp_rank} of {self.group_size}"
        if isinstance(request, messages.Hello | messages.Borrow):
            differences = self.fingerprint.differences(request.fingerprint)
            if differences:
                reason = f"the ranks do not serve the same thing: {describe(differences)}"
                with self._lock:
                    if self._known.met.get(rank) is None:
                        self._known.refusals[rank] = reason
                return reason
        with self._lock:
            seen = self._known.generations.get(rank, 0)
            if request.generation < seen:
                return f"generation {request.generation} of rank {rank} is stale; {seen} was here"
            self._known.generations[rank] = request.generation
        return None


def _shard_message(rank: int, generation: int, shard: PeerShard | _Published) -> messages.Shard:
    return messages.Shard(rank, generation, shard.num_bytes, shard.digest, shard.ready)


class _Server:
    """Accepts, checks the uid, reads one request, answers, hangs up. One thread, never blocks."""

    def __init__(
        self,
        listener: socket.socket,
        answer: Callable[[messages.Request, list[int]], tuple[messages.Reply, int | None]],
        name: str,
    ) -> None:
        self._listener = listener
        self._answer = answer
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._deadlines: dict[socket.socket, float] = {}
        self._last_warning = 0.0
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and close every socket."""
        self._wake_writer.send(b"x")
        self._thread.join()
        for connection in list(self._deadlines):
            self._hang_up(connection)
        self._selector.close()
        for owned in (self._listener, self._wake_reader, self._wake_writer):
            owned.close()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(timeout=1.0):
                if key.fileobj is self._wake_reader:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._serve(key.fileobj)
            now = time.monotonic()
            for connection in [c for c, deadline in self._deadlines.items() if deadline < now]:
                self._hang_up(connection)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            self._warn("accepting a connection failed: %s", error)
            time.sleep(0.01)
            return
        if len(self._deadlines) >= MAX_CONNECTIONS or not _same_user(connection):
            connection.close()
            return
        connection.setblocking(False)
        self._deadlines[connection] = time.monotonic() + CONNECTION_DEADLINE_S
        self._selector.register(connection, selectors.EVENT_READ)

    def _serve(self, connection: socket.socket) -> None:
        fds: list[int] = []
        try:
            request, fds = messages.receive_request(connection)
            reply, fd = self._answer(request, fds)
            messages.send(connection, reply, () if fd is None else (fd,))
        except ConnectionError:
            pass  # it only looked whether we are alive, or died meanwhile
        except (OSError, ProtocolError) as error:
            self._warn("a connection was dropped: %s", error)
        finally:
            for leftover in fds:
                os.close(leftover)
            self._hang_up(connection)

    def _hang_up(self, connection: socket.socket) -> None:
        self._deadlines.pop(connection, None)
        with suppress(KeyError, ValueError):
            self._selector.unregister(connection)
        connection.close()

    def _warn(self, text: str, error: Exception) -> None:
        """At most one line in ten seconds: a hostile peer must not fill the log."""
        now = time.monotonic()
        if now - self._last_warning > WAITING_NOTICE_S:
            self._last_warning = now
            logger.warning("DWDP rendezvous: " + text, error)


def _same_user(connection: socket.socket) -> bool:
    """Whether the other end runs as our user, or as root."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    return uid in (os.geteuid(), 0)


def query_status(endpoint: Endpoint, group: int, rank: int, timeout_s: float) -> dict[str, Any]:
    """Ask a rank how it is.

    Raises:
        RendezvousError: nobody listens there, or the answer is no status.
    """
    connection = endpoint.connect(group, rank, timeout_s)
    if connection is None:
        raise RendezvousError(f"rank {rank} of group {group} does not listen at {endpoint}")
    with connection:
        messages.send(connection, messages.StatusRequest())
        reply, fds = messages.receive_reply(connection)
    for fd in fds:
        os.close(fd)
    if not isinstance(reply, messages.Status):
        raise RendezvousError(f"rank {rank} of group {group} answered {type(reply).__name__}")
    return reply.content

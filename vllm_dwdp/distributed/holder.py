"""A group's shards held by somebody who is none of its ranks, so that they outlive all of them at once.

The holder has descriptors and nothing else: no mapping, no device, no vLLM, no torch. It answers like
a survivor, verifies nothing (whoever takes a shard over compares its digest) and refuses nobody but a
stale process: ranks that start with something new must be able to, so what cannot be theirs is given up
as soon as no rank runs with it. Nobody waits for a holder.

`look` runs in one thread of the owner, answers in another; neither waits for the other.
"""

import functools
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.connection import Connection
from vllm_dwdp.distributed.endpoint import HOLDER, Endpoint
from vllm_dwdp.distributed.fingerprint import Fingerprint, describe
from vllm_dwdp.distributed.published_shard import PublishedShard
from vllm_dwdp.distributed.server import CONNECTION_DEADLINE_S, Server
from vllm_dwdp.errors import DwdpError, ProtocolError
from vllm_dwdp.logger import format_gib

LOOK_TIMEOUT_S = 1.0
DOUBT_S = 10.0
"""So long is a start that had no use for what is held remembered, until no rank runs with it."""


class GroupHolder:
    """Holds the whole shards of one group from `open` until `close`.

    Args:
        endpoint: where the ranks meet.
        group: number of the group within the deployment.
        group_size: ranks of the group.
        make_room: called before files are opened, with their number and the purpose; may raise a
            DwdpError, and then they are not.
        shards: what is held; owned by `resources`.
        resources: everything that `close` closes.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        group: int,
        group_size: int,
        make_room: Callable[[int, str], None],
        shards: "HeldShards",
        resources: ExitStack,
    ) -> None:
        self.group = group
        self._endpoint = endpoint
        self._group_size = group_size
        self._make_room = make_room
        self._shards = shards
        self._resources = resources

    @classmethod
    def open(
        cls,
        endpoint: Endpoint,
        group: int,
        group_size: int,
        make_room: Callable[[int, str], None] = lambda num_files, purpose: None,
    ) -> "GroupHolder":
        """Listen, and answer in a daemon thread from now on.

        Raises:
            RendezvousError: the group has a holder already, or the endpoint cannot be used.
        """
        shards = HeldShards(group)
        with ExitStack() as undo:
            undo.callback(shards.close)
            server = Server(
                undo.enter_context(endpoint.listen(group, HOLDER)),
                lambda sock: endpoint.greet(sock, group, HOLDER),
                functools.partial(_answer, shards, group_size),
                lambda: None,
                f"dwdp-holder-{group}",
            )
            undo.callback(server.close)
            return cls(endpoint, group, group_size, make_room, shards, undo.pop_all())

    def close(self) -> None:
        """Give everything up; what ranks have mapped stays theirs. Idempotent."""
        self._resources.close()

    def look(self) -> list[str]:
        """Ask every rank once for what we do not have of it; what is news, one line each."""
        news = [line for rank in range(self._group_size) for line in self._ask(rank)]
        return news + self._shards.settle()

    def status(self) -> dict[str, Any]:
        """What we answer whoever asks how we are, as JSON."""
        return self._shards.status() | {"group_size": self._group_size}

    def _ask(self, rank: int) -> list[str]:
        try:
            connection = self._endpoint.connect(self.group, rank, LOOK_TIMEOUT_S)
            if connection is None:
                self._shards.note_running(rank, runs=False)
                return []
            with connection:
                connection.send_message(messages.Keep(self._shards.generation(rank)))
                return self._hear(rank, connection)
        except (OSError, ProtocolError):
            return []  # it hangs, or died meanwhile; we look again
        except DwdpError as error:
            return [f"the holder of group {self.group} cannot hold rank {rank}'s experts: {error}"]

    def _hear(self, rank: int, connection: Connection) -> list[str]:
        reply, stray = connection.receive_reply()
        messages.close_all(stray)
        if not isinstance(reply, messages.Identity):
            self._shards.note_running(rank, runs=isinstance(reply, messages.Accepted))
            return []
        header, stray = connection.receive_reply()
        messages.close_all(stray)
        if not isinstance(header, messages.Shard) or header.dwdp_rank != rank:
            raise ProtocolError(f"rank {rank} sent {type(header).__name__}, not its shard")
        self._make_room(header.num_fds, f"holding the experts of rank {rank}")
        fds, _ = connection.receive_handles(header)
        shard = PublishedShard(
            rank=rank,
            generation=header.generation,
            fds=tuple(fds),
            fabric_handles=(),
            handle_bytes=header.handle_bytes,
            layout=header.layout,
            digest=header.digest,
            ready=header.ready,
            is_lent=True,
        )
        return self._shards.hold(shard, reply.fingerprint)


class HeldShards:
    """What a holder has of a group: whole shards that all belong to one fingerprint.

    Shared by the thread that looks and the one that answers; every method takes the lock. Owns the
    descriptors; `close` closes them, once nobody answers any more.

    Args:
        group: number of the group, for sentences.
    """

    def __init__(self, group: int) -> None:
        self._group = group
        self._lock = threading.Lock()
        self._fingerprint: Fingerprint | None = None
        self._shards: dict[int, PublishedShard] = {}
        self._running: set[int] = set()
        self._retired: list[tuple[float, PublishedShard]] = []
        self._doubt: tuple[float, str] | None = None

    def close(self) -> None:
        """Close every descriptor; idempotent."""
        with self._lock:
            gone = [*self._shards.values(), *(shard for _, shard in self._retired)]
            self._shards, self._retired, self._running = {}, [], set()
        for shard in gone:
            shard.close()

    def generation(self, rank: int) -> int:
        """The start of `rank` whose shard we hold; 0 if we hold none."""
        with self._lock:
            return self._shards[rank].generation if rank in self._shards else 0

    def note_running(self, rank: int, *, runs: bool) -> None:
        """Note whether a rank runs with the shard that we hold of it."""
        with self._lock:
            (self._running.add if runs else self._running.discard)(rank)

    def hold(self, shard: PublishedShard, fingerprint: Fingerprint) -> list[str]:
        """Keep a shard, in place of an earlier one of its rank; what is news."""
        with self._lock:
            known, news = self._fingerprint, []
            if known is not None and known.differences(fingerprint):
                news = self._give_up(describe(known.differences(fingerprint)))
            if shard.rank in self._shards:
                self._retire(shard.rank)
            self._fingerprint = fingerprint
            self._shards[shard.rank] = shard
            self._running.add(shard.rank)
            self._doubt = None
        return news

    def settle(self) -> list[str]:
        """Give up what no start can use and no rank runs with; close what nobody is sent any more."""
        now, news = time.monotonic(), []
        with self._lock:
            if self._doubt is not None and not self._running:
                news = self._give_up(self._doubt[1])
            elif self._doubt is not None and now - self._doubt[0] > DOUBT_S:
                self._doubt = None
            done = [shard for since, shard in self._retired if now - since > CONNECTION_DEADLINE_S]
            self._retired = [entry for entry in self._retired if entry[1] not in done]
        for shard in done:
            shard.close()
        return news

    def lend(self, request: messages.Borrow) -> list[messages.Packet]:
        """Make the packets of our reply to a rank that asks for a shard."""
        with self._lock:
            if self._fingerprint is None:
                return [(messages.NotYet(), ())]
            if differences := self._fingerprint.differences(request.fingerprint):
                self._doubt = time.monotonic(), describe(differences)
                return [(messages.NotYet(), ())]
            own = self._shards.get(request.dwdp_rank)
            if own is not None and request.generation < own.generation:
                reason = f"generation {request.generation} of rank {own.rank} is stale"
                return [
                    (messages.Refused(f"{reason}; {own.generation} was here", own.generation), ())
                ]
            shard = self._shards.get(request.wanted)
        if shard is None:
            return [(messages.NotYet(), ())]
        return list(shard.packets(with_handles=request.wants_handles))

    def doubt(self, request: messages.Failed) -> list[messages.Packet]:
        """Note that a rank could not start; if none runs, that may be for what we hold."""
        with self._lock:
            if self._shards:
                reason = f"rank {request.dwdp_rank} failed to start: {request.reason}"
                self._doubt = time.monotonic(), reason
        return [(messages.Accepted(), ())]

    def status(self) -> dict[str, Any]:
        """What is held, as JSON; `shared_bytes` are those that a living rank has as well."""
        with self._lock:
            held = {rank: sum(shard.handle_bytes) for rank, shard in sorted(self._shards.items())}
            shared = sum(num_bytes for rank, num_bytes in held.items() if rank in self._running)
        return {
            "group": self._group,
            "role": "holder",
            "state": "holding",
            "pid": os.getpid(),
            "held_ranks": list(held),
            "held_bytes": sum(held.values()),
            "shared_bytes": shared,
        }

    def _retire(self, rank: int) -> None:
        """Hold a shard no longer; a reply may still be sending it."""
        self._retired.append((time.monotonic(), self._shards.pop(rank)))
        self._running.discard(rank)

    def _give_up(self, reason: str) -> list[str]:
        num_bytes = sum(sum(shard.handle_bytes) for shard in self._shards.values())
        ranks = sorted(self._shards)
        for rank in ranks:
            self._retire(rank)
        self._fingerprint = self._doubt = None
        if not ranks:
            return []
        return [
            f"the holder of group {self._group} gives up {format_gib(num_bytes)} of experts of ranks "
            f"{ranks}, which no rank runs with: {reason}"
        ]


def _answer(
    shards: HeldShards, group_size: int, request: messages.Request
) -> list[messages.Packet]:
    """Answer one request (in the server's thread)."""
    if isinstance(request, messages.StatusRequest):
        return [(messages.Status(shards.status() | {"group_size": group_size}), ())]
    if isinstance(request, messages.Borrow):
        return shards.lend(request)
    if isinstance(request, messages.Failed):
        return shards.doubt(request)
    return [(messages.NotYet(), ())]

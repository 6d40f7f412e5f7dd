"""What a holder has of a group, and what it therefore answers (`holder` asks for it)."""

import os
import threading
import time
from typing import Any

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.fingerprint import Fingerprint, describe
from vllm_dwdp.distributed.published_shard import PublishedShard
from vllm_dwdp.distributed.server import CONNECTION_DEADLINE_S
from vllm_dwdp.logger import format_gib

DOUBT_S = 10.0
"""So long is a start that had no use for what is held remembered, until no rank runs with it."""


class HeldShards:
    """What a holder has of a group: whole shards that all belong to one fingerprint.

    Shared by the thread that looks and the one that answers; every method takes the lock. Owns the
    descriptors; `close` closes them, once no thread answers any more.

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
        """Return the start of `rank` whose shard we hold; 0 if we hold none."""
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
        """Give up what no start can use and no rank runs with; close what is sent no more."""
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
                reason = (
                    f"generation {request.generation} of rank {own.rank} is stale: generation "
                    f"{own.generation}, a later start, has joined. End the older process"
                )
                return [(messages.Refused(reason, own.generation), ())]
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
        """Return what is held, as JSON; `shared_bytes` are those that a living rank has as well."""
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

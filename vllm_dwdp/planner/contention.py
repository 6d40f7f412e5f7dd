"""What a layer takes when ranks pull from each other: source queues, slices, pull order.

::

    rank r   pull l+1 | pull l+2      | pull l+3          two slots: pull l+2 may start when
             compute l    | compute l+1   | compute l+2   compute l has freed its slot

A source serves the slices that reach it first come, first served; a rank's own link takes in one slice
after the other. Discrete events, deterministic for a seed.
"""

import heapq
import random
import statistics
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from math import comb

JITTER = 0.1
"""Layers of real steps differ in length: compute is drawn from 1 +- this."""
RATIOS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
SIMULATED_SLICES = 400_000
"""For all ratios together: one to two seconds."""


class PullOrder(StrEnum):
    """The order in which a rank visits its peers."""

    ROTATED = "rank + 1, rank + 2, ..."
    RANDOM = "drawn anew for each layer"


def contention(group_size: int) -> list[float]:
    """Return Pr[C = c], c = 1, 2, ...: pulls that meet at a source when every rank picks a random peer.

    Source: arXiv 2604.01621, section 4.3.1: C - 1 ~ Binomial(N - 2, 1 / (N - 1)).
    """
    trials, chance = group_size - 2, 1 / (group_size - 1)
    return [
        comb(trials, others) * chance**others * (1 - chance) ** (trials - others)
        for others in range(trials + 1)
    ]


@dataclass(frozen=True, kw_only=True)
class Pulls:
    """How a group pulls.

    Args:
        group_size: ranks, each a source for all others.
        slices_per_peer: pieces that each peer's share is cut into.
        in_flight: slices of a rank under way at once.
        order: of the peers.
    """

    group_size: int
    slices_per_peer: int
    in_flight: int = 2
    order: PullOrder = PullOrder.ROTATED


def num_layers(group_size: int) -> int:
    """Return the layers of each rank that a ratio is simulated with."""
    return 40 if group_size <= 16 else 12


def finest_slices(group_size: int) -> int:
    """Return the most slices per peer that are simulated."""
    per_slice = len(RATIOS) * num_layers(group_size) * group_size * (group_size - 1)
    return max(1, SIMULATED_SLICES // per_slice)


@lru_cache(maxsize=256)
def layer_time(pulls: Pulls, compute: float, seed: int = 0) -> float:
    """Simulate the mean time of a layer, in units of the ideal time of its pull.

    Args:
        compute: of a layer, in the same unit.
    """
    if pulls.group_size < 3:  # one source each: no other rank pulls from it
        return max(compute, 1.0)
    count, dice = num_layers(pulls.group_size), random.Random(seed)
    piece = 1.0 / ((pulls.group_size - 1) * pulls.slices_per_peer)
    source_free = [0.0] * pulls.group_size
    ranks = [_Rank(rank, pulls, compute, dice) for rank in range(pulls.group_size)]
    events = [(dice.random() * max(1.0, compute), rank) for rank in range(pulls.group_size)]
    heapq.heapify(events)
    while events:
        now, number = heapq.heappop(events)
        rank = ranks[number]
        following = rank.advance(now, source_free, piece)
        if len(rank.computed_at) < count:
            heapq.heappush(events, (following, number))
    warm = count // 4
    return statistics.mean(
        (rank.computed_at[-1] - rank.computed_at[warm]) / (count - 1 - warm) for rank in ranks
    )


class _Rank:
    """One rank's pulls and layers, one after the other."""

    def __init__(self, rank: int, pulls: Pulls, compute: float, dice: random.Random) -> None:
        size = pulls.group_size
        self._peers = [(rank + step) % size for step in range(1, size)]
        self._pulls, self._compute, self._dice = pulls, compute, dice
        self._queue: deque[int] = deque(self._order())
        self._under_way: list[float] = []
        self._link_free = 0.0
        self.computed_at: list[float] = []

    def advance(self, now: float, source_free: list[float], piece: float) -> float:
        """Issue what may be issued, or end this pull; return when to come back."""
        while self._under_way and self._under_way[0] <= now:
            heapq.heappop(self._under_way)
        while self._queue and len(self._under_way) < self._pulls.in_flight:
            source = self._queue.popleft()
            source_free[source] = max(now, source_free[source]) + piece
            self._link_free = max(now, self._link_free) + piece
            heapq.heappush(self._under_way, max(source_free[source], self._link_free))
        if self._under_way:
            return self._under_way[0]
        previous = self.computed_at[-1] if self.computed_at else now
        length = self._compute * self._dice.uniform(1.0 - JITTER, 1.0 + JITTER)
        self.computed_at.append(max(now, previous) + length)
        self._queue.extend(self._order())
        return max(now, previous)  # the slot of the layer before is free then

    def _order(self) -> Sequence[int]:
        peers = self._peers
        if self._pulls.order is PullOrder.RANDOM:
            peers = self._dice.sample(peers, len(peers))
        return peers * self._pulls.slices_per_peer


@lru_cache(maxsize=64)
def _table(pulls: Pulls) -> tuple[float, ...]:
    """Return `layer_time` at each of RATIOS."""
    return tuple(layer_time(pulls, ratio) for ratio in RATIOS)


def contended_layer(pulls: Pulls, compute: float, prefetch: float) -> float:
    """Return the seconds of a layer of that compute and that ideal prefetch, sources contended.

    Interpolated between simulated ratios; beyond the last one the pulls hide completely.
    """
    if prefetch <= 0:
        return compute
    ratio = compute / prefetch
    table = _table(pulls)
    if ratio >= RATIOS[-1]:
        return compute
    index = bisect_left(RATIOS, ratio)
    if index == 0:
        return max(compute, table[0] * prefetch)
    low, high = RATIOS[index - 1], RATIOS[index]
    part = (ratio - low) / (high - low)
    return max(compute, prefetch * (table[index - 1] * (1 - part) + table[index] * part))

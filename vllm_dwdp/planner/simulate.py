"""Prefill ranks under traffic: DEP in lockstep against independent DWDP ranks. Discrete events.

A rank takes whole prompts from its queue, up to `max_num_batched_tokens`, and steps. Under DEP all
ranks step together: a step takes as long as its slowest rank, and an idle rank runs along. Under DWDP
each rank steps alone, and waits only for its own copies, which queue at their sources.
Deterministic for a seed.
"""

import heapq
import json
import random
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.cost import CostModel, Step


@dataclass(frozen=True, kw_only=True, order=True)
class Request:
    """One prompt, at a rank from `arrival_s` on."""

    arrival_s: float
    input_tokens: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulated deployment did.

    Args:
        num_steps: over all ranks.
        tokens_per_s: prompt tokens per second and rank, from the first arrival to the last answer.
        ttft_s: time to first token of each request, in order of completion.
    """

    num_steps: int
    tokens_per_s: float
    ttft_s: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Of the time to first token, seconds."""
        ordered = sorted(self.ttft_s)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def poisson_traffic(
    *,
    num_requests: int,
    requests_per_s: float,
    input_tokens: int,
    smallest_share: float,
    seed: int,
) -> list[Request]:
    """Poisson arrivals, prompt lengths uniform in [smallest_share * input_tokens, input_tokens].

    Raises:
        DwdpConfigError: a rate, length or share that cannot be.
    """
    if requests_per_s <= 0:
        raise DwdpConfigError(f"--rate {requests_per_s} must be positive.")
    if input_tokens < 1 or num_requests < 1:
        raise DwdpConfigError("--input-tokens and --requests must be at least 1.")
    if not 0 < smallest_share <= 1:
        raise DwdpConfigError(f"--smallest-share {smallest_share} must lie in (0, 1].")
    dice, now, requests = random.Random(seed), 0.0, []
    for _ in range(num_requests):
        now += dice.expovariate(requests_per_s)
        length = round(dice.uniform(smallest_share, 1.0) * input_tokens)
        requests.append(Request(arrival_s=now, input_tokens=max(1, length)))
    return requests


def read_trace(path: Path) -> list[Request]:
    """A JSON-lines trace: `{"arrival_s": 0.25, "input_tokens": 812}` per line, in order of arrival.

    Raises:
        DwdpConfigError: the file cannot be read, or a line is broken; names its number.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise DwdpConfigError(f"--trace {path}: {error}.") from error
    requests = [_trace_line(path, number, line) for number, line in enumerate(lines, 1) if line]
    if not requests:
        raise DwdpConfigError(f"--trace {path} holds no request.")
    return sorted(requests)


def _trace_line(path: Path, number: int, line: str) -> Request:
    try:
        entry = json.loads(line)
        arrival, tokens = float(entry["arrival_s"]), int(entry["input_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise DwdpConfigError(
            f"--trace {path}, line {number}: {line[:60]!r} is not "
            '{"arrival_s": seconds, "input_tokens": count}.'
        ) from error
    if arrival < 0 or tokens < 1:
        raise DwdpConfigError(f"--trace {path}, line {number}: negative time or no tokens.")
    return Request(arrival_s=arrival, input_tokens=tokens)


class _Ranks:
    """The queues of all ranks; requests are dealt round-robin as they arrive."""

    def __init__(self, requests: Sequence[Request], num_ranks: int, max_tokens: int) -> None:
        self.queues: list[deque[Request]] = [deque() for _ in range(num_ranks)]
        self.max_tokens = max_tokens
        self.ttft_s: list[float] = []
        for index, request in enumerate(requests):
            self.queues[index % num_ranks].append(request)

    def next_arrival(self, rank: int) -> float:
        return self.queues[rank][0].arrival_s if self.queues[rank] else float("inf")

    def take(self, rank: int, now: float) -> list[Request]:
        """Prompts that have arrived, as many as fit a step, at least one."""
        batch: list[Request] = []
        room, queue = self.max_tokens, self.queues[rank]
        while queue and queue[0].arrival_s <= now and (not batch or queue[0].input_tokens <= room):
            batch.append(queue.popleft())
            room -= batch[-1].input_tokens
        return batch

    def answer(self, batch: list[Request], now: float) -> None:
        self.ttft_s.extend(now - request.arrival_s for request in batch)


def _step_of(batch: list[Request]) -> Step:
    tokens = sum(request.input_tokens for request in batch)
    squares = sum(request.input_tokens**2 for request in batch)
    return Step(num_tokens=tokens, mean_keys=squares / tokens / 2)


def simulate_dwdp(
    model: CostModel,
    requests: Sequence[Request],
    *,
    max_tokens: int,
    contention_factor: float = 1.0,
) -> Outcome:
    """Every rank on its own clock; a step is layers of max(compute, prefetch under contention)."""
    ranks = _Ranks(requests, model.group_size, max_tokens)
    layers = model.shape.num_moe_layers
    prefetch = model.prefetch * contention_factor
    num_steps, last = 0, 0.0
    events = [(ranks.next_arrival(rank), rank) for rank in range(model.group_size)]
    heapq.heapify(events)
    while events:
        now, rank = heapq.heappop(events)
        batch = ranks.take(rank, now)
        if batch:
            compute = model.layer(_step_of(batch), model.shape.num_experts).compute
            now += layers * max(compute / model.efficiency.beside_copies, prefetch)
            ranks.answer(batch, now)
            num_steps, last = num_steps + 1, max(last, now)
        arrival = ranks.next_arrival(rank)
        if arrival < float("inf"):
            heapq.heappush(events, (max(now, arrival), rank))
    return _outcome(requests, ranks, num_steps, last, model.group_size)


def simulate_dep(
    model: CostModel,
    requests: Sequence[Request],
    *,
    max_tokens: int,
    routing_skew: float = 1.0,
) -> Outcome:
    """All ranks in lockstep: a layer waits for the longest attention, then the busiest experts."""
    ranks = _Ranks(requests, model.group_size, max_tokens)
    layers, now, num_steps = model.shape.num_moe_layers, 0.0, 0
    while any(ranks.queues):
        now = max(now, min(ranks.next_arrival(rank) for rank in range(model.group_size)))
        batches = [ranks.take(rank, now) for rank in range(model.group_size)]
        now += layers * _lockstep_layer(model, [batch for batch in batches if batch], routing_skew)
        for batch in batches:
            ranks.answer(batch, now)
        num_steps += model.group_size
    return _outcome(requests, ranks, num_steps, now, model.group_size)


def _lockstep_layer(model: CostModel, batches: list[list[Request]], routing_skew: float) -> float:
    steps = [_step_of(batch) for batch in batches]
    own = [model.dep_compute(step) for step in steps]
    attention = max(
        layer.attention_linear + layer.attention_core + layer.shared_experts for layer in own
    )
    # Routed tokens of all ranks spread over all ranks: the mean, times the skew of the busiest.
    total = sum(step.num_tokens for step in steps)
    mean = Step(num_tokens=total / model.group_size, mean_keys=1.0)
    experts = model.dep_compute(mean).routed_experts * routing_skew
    return attention + experts + max(model.all_to_all(step) for step in steps)


def _outcome(
    requests: Sequence[Request], ranks: _Ranks, num_steps: int, last: float, num_ranks: int
) -> Outcome:
    tokens = sum(request.input_tokens for request in requests)
    seconds = last - requests[0].arrival_s
    return Outcome(
        num_steps=num_steps,
        tokens_per_s=tokens / seconds / num_ranks,
        ttft_s=tuple(ranks.ttft_s),
    )


def contention_factor(
    group_size: int,
    *,
    slices_per_peer: int,
    rotated: bool = True,
    seed: int = 0,
    num_layers: int = 24,
) -> float:
    """Mean time to pull a layer over its ideal time, when sources serve pulls first come first served.

    Ranks begin their layers at random moments, pull slice by slice from peer after peer with two
    slices in flight, and rest as long as a pull would ideally take (the compute that hides it).

    Args:
        slices_per_peer: pieces that each peer's share is cut into.
        rotated: start at the next rank; otherwise every rank draws its own order.
    """
    if group_size < 3:
        return 1.0
    dice = random.Random(seed)
    piece = 1.0 / ((group_size - 1) * slices_per_peer)
    free_at = [0.0] * group_size
    pulls = [_Pull(rank, group_size, slices_per_peer, rotated, dice) for rank in range(group_size)]
    events = [(dice.random(), rank) for rank in range(group_size)]
    heapq.heapify(events)
    times: list[float] = []
    while len(times) < num_layers * group_size:
        now, rank = heapq.heappop(events)
        pull = pulls[rank]
        if pull.in_flight and pull.in_flight[0] <= now:
            heapq.heappop(pull.in_flight)
        if not pull.begun:
            pull.begin(now)
        while len(pull.in_flight) < 2 and pull.queue:
            source = pull.queue.popleft()
            # The source serves one slice after the other; our own link takes one slice's time each.
            free_at[source] = max(now, free_at[source]) + piece
            pull.link_free = max(now, pull.link_free) + piece
            heapq.heappush(pull.in_flight, max(free_at[source], pull.link_free))
        if pull.in_flight:
            heapq.heappush(events, (pull.in_flight[0], rank))
        else:
            times.append(now - pull.began)
            pull.begun = False
            heapq.heappush(events, (now + 1.0, rank))
    return statistics.mean(times)


class _Pull:
    """One rank's pull of one layer after the other."""

    def __init__(
        self, rank: int, group_size: int, slices: int, rotated: bool, dice: random.Random
    ) -> None:
        self._peers = [(rank + step) % group_size for step in range(1, group_size)]
        self._slices, self._rotated, self._dice = slices, rotated, dice
        self.queue: deque[int] = deque()
        self.in_flight: list[float] = []
        self.link_free = self.began = 0.0
        self.begun = False

    def begin(self, now: float) -> None:
        self.begun, self.began = True, now
        peers = self._peers if self._rotated else self._dice.sample(self._peers, len(self._peers))
        self.queue.extend(peer for _ in range(self._slices) for peer in peers)


def sweep(
    model: CostModel, requests: Sequence[Request], *, max_tokens: int, routing_skew: float
) -> Iterator[tuple[str, Outcome]]:
    """The deployments that `vllm-dwdp simulate` compares."""
    yield "DEP", simulate_dep(model, requests, max_tokens=max_tokens, routing_skew=routing_skew)
    slices = max(1, round(model.remote_bytes / max(1, model.group_size - 1) / (2 * 2**20)))
    factor = contention_factor(model.group_size, slices_per_peer=min(slices, 8))
    yield (
        "DWDP",
        simulate_dwdp(model, requests, max_tokens=max_tokens, contention_factor=factor),
    )

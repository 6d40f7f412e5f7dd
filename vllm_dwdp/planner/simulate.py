"""Prefill ranks under traffic: DEP in lockstep against independent DWDP ranks. Discrete events.

A rank fills each step from its queue up to `max_num_batched_tokens`, cutting prompts where a step is
full, as vLLM's chunked prefill does by default. Under DEP all ranks step together: every layer waits
for the slowest rank before the experts and for the busiest experts after them, and an idle rank runs
along. Under DWDP each rank steps alone, and waits only for its own copies, which queue at their sources
(`contention`). Deterministic for a seed.

A rank's layers are alike, so a step is one layer's time as often as it has layers; the contention of a
layer is simulated slice by slice once per ratio of compute to prefetch and looked up from then on.
"""

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import real, whole
from vllm_dwdp.planner.contention import PullOrder, Pulls, contended_layer, finest_slices
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.step import Step
from vllm_dwdp.planner.traffic import Request

SLICE_MIB = 32.0
"""As the runtime cuts copies on GPUs (`device.cuda_queue`)."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of the values do not exceed; 0 of none."""
    ordered = sorted(values) or [0.0]
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulated deployment did.

    Args:
        num_steps: over all ranks.
        tokens_per_s: prompt tokens per second and rank, from the first arrival to the last answer.
        busy: part of that time in which a rank was in a step, its own or its group's.
        ttft_s: time to first token of each request, in order of completion.
    """

    num_steps: int
    tokens_per_s: float
    busy: float
    ttft_s: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Return a percentile of the time to first token, seconds."""
        return percentile(self.ttft_s, percent)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, stop)` of a prompt, computed in one step."""

    request: Request
    start: int
    stop: int


class Ranks:
    """The queues of all ranks; requests are dealt round-robin as they arrive."""

    def __init__(self, requests: Sequence[Request], num_ranks: int, max_tokens: int) -> None:
        self.queues: list[deque[Request]] = [deque() for _ in range(num_ranks)]
        self.max_tokens = max_tokens
        self._computed = [0] * num_ranks  # tokens of the first prompt in each queue
        self.ttft_s: list[float] = []
        for index, request in enumerate(requests):
            self.queues[index % num_ranks].append(request)

    def begin_apart(self, dice: random.Random) -> None:
        """Begin anywhere in the first prompts, as ranks that have run for long do."""
        for rank, queue in enumerate(self.queues):
            self._computed[rank] = dice.randrange(queue[0].input_tokens)

    def next_arrival(self, rank: int) -> float:
        return self.queues[rank][0].arrival_s if self.queues[rank] else float("inf")

    def take(self, rank: int, now: float) -> list[Chunk]:
        """Return what a step computes: prompts that have arrived, in order; the last one may be cut."""
        chunks: list[Chunk] = []
        room, queue = self.max_tokens, self.queues[rank]
        while room and queue and queue[0].arrival_s <= now:
            request, start = queue[0], self._computed[rank]
            stop = min(request.input_tokens, start + room)
            chunks.append(Chunk(request, start, stop))
            room -= stop - start
            if stop == request.input_tokens:
                queue.popleft()
                stop = 0
            self._computed[rank] = stop
        return chunks

    def answer(self, chunks: list[Chunk], now: float) -> None:
        """End a step: prompts that end with it have their first token."""
        self.ttft_s.extend(
            now - chunk.request.arrival_s
            for chunk in chunks
            if chunk.stop == chunk.request.input_tokens
        )


def step_of(chunks: Sequence[Chunk]) -> Step:
    """Join chunks to one step; a token attends to all of its prompt before it."""
    tokens = sum(chunk.stop - chunk.start for chunk in chunks)
    keys = sum((chunk.stop - chunk.start) * (chunk.start + chunk.stop) for chunk in chunks) / 2
    return Step(num_tokens=tokens, mean_keys=keys / tokens)


def default_pulls(model: CostModel, slice_mib: float = SLICE_MIB) -> Pulls:
    """Pull in rotated order, in slices of `slice_mib` or the finest that are simulated."""
    slices = min(finest_slices(model.group_size), max(1, round(_share_mib(model) / slice_mib)))
    return Pulls(group_size=model.group_size, slices_per_peer=slices)


def _share_mib(model: CostModel) -> float:
    """Return what one peer sends of a layer."""
    return model.remote_bytes / max(1, model.group_size - 1) / 2**20


def pulls_for(model: CostModel, slice_mib: float, order: str) -> Pulls:
    """Pull as the user says.

    Args:
        slice_mib: 0 copies a peer's whole share at a time.
        order: `rotated` or `random`.

    Raises:
        DwdpConfigError: a slice or an order that cannot be.
    """
    names = {"rotated": PullOrder.ROTATED, "random": PullOrder.RANDOM}
    if order not in names:
        raise DwdpConfigError(f"--pull-order {order!r} is unknown; known are {', '.join(names)}.")
    if slice_mib == 0:
        return Pulls(
            group_size=model.group_size, slices_per_peer=1, in_flight=1, order=names[order]
        )
    real("--slice-mib", slice_mib, above=True)
    return replace(default_pulls(model, slice_mib), order=names[order])


def coarsened(model: CostModel, slice_mib: float, pulls: Pulls) -> str:
    """Say where copies are simulated in larger slices than was asked for; empty if not."""
    simulated = _share_mib(model) / pulls.slices_per_peer
    if slice_mib == 0 or simulated < 1.5 * slice_mib:
        return ""
    return (
        f"Slices of {slice_mib:g} MiB are simulated as {pulls.slices_per_peer} of {simulated:.3g} MiB "
        "per peer: finer ones take long to simulate and change a layer by less than 2 %."
    )


def check_steps(max_tokens: int, routing_skew: float) -> None:
    """Refuse what cannot be simulated.

    Raises:
        DwdpConfigError: a step without tokens, or a skew below 1.
    """
    whole("--max-num-batched-tokens", max_tokens, 1)
    real("--routing-skew", routing_skew, 1)


def dwdp_step(model: CostModel, step: Step, pulls: Pulls) -> float:
    """Time a DWDP step whose layers wait for contended copies."""
    return model.dwdp_step(step, lambda compute: contended_layer(pulls, compute, model.prefetch))


def simulate_dwdp(
    model: CostModel,
    requests: Sequence[Request],
    *,
    max_tokens: int,
    pulls: Pulls | None = None,
) -> Outcome:
    """Run every rank on its own clock."""
    ranks = Ranks(requests, model.group_size, max_tokens)
    pulls = pulls or default_pulls(model)
    num_steps, last, busy = 0, 0.0, 0.0
    events = [(ranks.next_arrival(rank), rank) for rank in range(model.group_size)]
    heapq.heapify(events)
    while events:
        now, rank = heapq.heappop(events)
        chunks = ranks.take(rank, now)
        if chunks:
            seconds = dwdp_step(model, step_of(chunks), pulls)
            now, busy = now + seconds, busy + seconds
            ranks.answer(chunks, now)
            num_steps, last = num_steps + 1, max(last, now)
        arrival = ranks.next_arrival(rank)
        if arrival < float("inf"):
            heapq.heappush(events, (max(now, arrival), rank))
    return _outcome(requests, ranks, num_steps, last, busy / model.group_size)


def simulate_dep(
    model: CostModel,
    requests: Sequence[Request],
    *,
    max_tokens: int,
    routing_skew: float = 1.0,
) -> Outcome:
    """Run all ranks in lockstep."""
    ranks = Ranks(requests, model.group_size, max_tokens)
    now, num_steps, busy = 0.0, 0, 0.0
    while any(ranks.queues):
        now = max(now, min(ranks.next_arrival(rank) for rank in range(model.group_size)))
        taken = [ranks.take(rank, now) for rank in range(model.group_size)]
        steps = [step_of(chunks) for chunks in taken if chunks]
        seconds = lockstep(model, steps, routing_skew)
        now, busy = now + seconds, busy + seconds
        for chunks in taken:
            ranks.answer(chunks, now)
        num_steps += model.group_size
    return _outcome(requests, ranks, num_steps, now, busy)


def lockstep(model: CostModel, steps: Sequence[Step], routing_skew: float = 1.0) -> float:
    """Time a DEP step with two barriers in every layer; `steps` are of the ranks that have work."""
    layers = model.shape.num_moe_layers
    before = max(
        layers * model.layer(step, model.shape.num_experts).before_experts
        + model.dense_layers(step).compute
        for step in steps
    )
    # Routed tokens of all ranks spread over all ranks: the mean, times the skew of the busiest.
    total = sum(step.num_tokens for step in steps)
    mean = Step(num_tokens=total / model.group_size, mean_keys=1.0)
    experts = model.dep_compute(mean).experts * routing_skew
    return before + layers * (experts + max(model.all_to_all(step) for step in steps))


def _outcome(
    requests: Sequence[Request], ranks: Ranks, num_steps: int, last: float, busy_s: float
) -> Outcome:
    tokens = sum(request.input_tokens for request in requests)
    seconds = last - requests[0].arrival_s
    return Outcome(
        num_steps=num_steps,
        tokens_per_s=tokens / seconds / len(ranks.queues),
        busy=busy_s / seconds,
        ttft_s=tuple(ranks.ttft_s),
    )

"""Prompt tokens per second of ranks that always have work: what a deployment can do, at any load. Pure.

Counted from the steps themselves, under DEP until the first rank runs dry, so that no idle rank counts.
Both deployments compute the same prompts, and their ranks begin anywhere in the middle of them: of long
prompts that begin together all ranks would compute the same part for ever, which flatters DEP.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle

from vllm_dwdp.planner.contention import Pulls
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.simulate import Chunk, Ranks, default_pulls, dwdp_step, lockstep, step_of
from vllm_dwdp.planner.traffic import Request

STEPS_PER_RANK, PROMPTS_PER_RANK = 32, 8
"""Full steps that a backlog lasts, and the fewest prompts of it."""
NUM_DRAWS = 4
"""Of the places where ranks begin."""
LONGEST_BACKLOG = 20_000
"""Prompts; with very short ones a backlog lasts for fewer steps."""


def backlog(requests: Sequence[Request], num_ranks: int, max_tokens: int) -> list[Request]:
    """Repeat or cut the prompts to some steps of every rank, all waiting."""
    wanted, fewest = STEPS_PER_RANK * num_ranks * max_tokens, PROMPTS_PER_RANK * num_ranks
    prompts: list[Request] = []
    for request in cycle(requests):
        lasts = wanted <= 0 or len(prompts) >= LONGEST_BACKLOG
        if lasts and len(prompts) >= fewest:
            break
        prompts.append(replace(request, arrival_s=0.0))
        wanted -= request.input_tokens
    return prompts


def dep_capacity(
    model: CostModel, requests: Sequence[Request], *, max_tokens: int, routing_skew: float
) -> float:
    """Return prompt tokens per second and rank of ranks in lockstep."""
    tokens, seconds = 0, 0.0
    for ranks in _busy_ranks(model, requests, max_tokens):
        while all(ranks.queues):
            taken = [ranks.take(rank, 0.0) for rank in range(model.group_size)]
            seconds += lockstep(model, [step_of(chunks) for chunks in taken], routing_skew)
            tokens += sum(_num_tokens(chunks) for chunks in taken)
    return tokens / seconds / model.group_size


def dwdp_capacity(
    model: CostModel, requests: Sequence[Request], *, max_tokens: int, pulls: Pulls | None = None
) -> float:
    """Return prompt tokens per second and rank of independent ranks."""
    tokens, seconds, pulls = 0, 0.0, pulls or default_pulls(model)
    for ranks in _busy_ranks(model, requests, max_tokens):
        for rank in range(model.group_size):
            while chunks := ranks.take(rank, 0.0):
                seconds += dwdp_step(model, step_of(chunks), pulls)
                tokens += _num_tokens(chunks)
    return tokens / seconds


def _busy_ranks(model: CostModel, requests: Sequence[Request], max_tokens: int) -> Iterator[Ranks]:
    dice, waiting = random.Random(0), backlog(requests, model.group_size, max_tokens)
    for _ in range(NUM_DRAWS):
        ranks = Ranks(waiting, model.group_size, max_tokens)
        ranks.begin_apart(dice)
        yield ranks


def _num_tokens(chunks: Sequence[Chunk]) -> int:
    return sum(chunk.stop - chunk.start for chunk in chunks)

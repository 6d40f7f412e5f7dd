"""Steps of ranks whose queues never run dry, as in context-only benchmarks. Monte Carlo, seeded."""

import random
import statistics
from dataclasses import dataclass

from vllm_dwdp.paper.factors import FITTED
from vllm_dwdp.planner.contention import Pulls
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.simulate import default_pulls, dwdp_step, lockstep
from vllm_dwdp.planner.step import Step

NUM_STEPS = 400
SLICE_MIB = 2.0
"""As TensorRT-LLM slices, whose figures these are."""


@dataclass(frozen=True)
class Lengths:
    """Prompt lengths: uniform in [smallest_share, 1] * longest, or normal around it.

    Args:
        longest: tokens; of the normal distribution the mean.
        smallest_share: shortest over longest.
        deviation: standard deviation, tokens; 0 for the uniform distribution.
    """

    longest: int
    smallest_share: float = 1.0
    deviation: float = 0.0

    @property
    def mean(self) -> float:
        """Tokens."""
        return self.longest * (1.0 + self.smallest_share) / 2

    def draw(self, dice: random.Random) -> float:
        """One prompt."""
        if self.deviation:
            return max(1.0, dice.gauss(self.longest, self.deviation))
        return self.longest * dice.uniform(self.smallest_share, 1.0)


def prompts_per_step(lengths: Lengths, max_tokens: int) -> int:
    """Whole prompts of mean length that fit a step; at least one."""
    return max(1, int(max_tokens / lengths.mean))


def mean_step(lengths: Lengths, max_tokens: int) -> Step:
    """Return a step of so many prompts of mean length."""
    half_range = lengths.longest * (1.0 - lengths.smallest_share) / 2
    squares = lengths.mean**2 + half_range**2 / 3 + lengths.deviation**2
    return Step(
        num_tokens=prompts_per_step(lengths, max_tokens) * lengths.mean,
        mean_keys=squares / lengths.mean / 2,
    )


def draw_steps(
    lengths: Lengths, count: int, num_ranks: int, variation: float, dice: random.Random
) -> list[Step]:
    """Return a step of every rank: `count` prompts each, dealt so that their tokens are about equal.

    Args:
        variation: of a rank's step beyond the lengths of its prompts.
    """
    prompts = sorted((lengths.draw(dice) for _ in range(count * num_ranks)), reverse=True)
    hands: list[list[float]] = [[] for _ in range(num_ranks)]
    for prompt in prompts:
        min((hand for hand in hands if len(hand) < count), key=sum).append(prompt)
    half_width = variation * 3**0.5
    return [
        Step(
            num_tokens=sum(hand) * dice.uniform(1.0 - half_width, 1.0 + half_width),
            mean_keys=sum(prompt**2 for prompt in hand) / sum(hand) / 2,
        )
        for hand in hands
    ]


def synchronisation_seconds(model: CostModel, step: Step, variation: float) -> float:
    """Return what a DEP step waits when the ranks' tokens vary so much around `step`'s."""
    dice, half_width = random.Random(0), variation * 3**0.5
    skew = FITTED["routing_skew"].value
    times = []
    for _ in range(NUM_STEPS):
        factors = [
            dice.uniform(1.0 - half_width, 1.0 + half_width) for _ in range(model.group_size)
        ]
        scale = len(factors) / sum(factors)
        steps = [
            Step(num_tokens=step.num_tokens * factor * scale, mean_keys=step.mean_keys)
            for factor in factors
        ]
        exchange = max(model.all_to_all(other) for other in steps) - model.all_to_all(step)
        times.append(lockstep(model, steps, skew) - model.shape.num_moe_layers * exchange)
    return statistics.mean(times) - lockstep(model, [step] * model.group_size)


def saturated_gain(
    dep: CostModel,
    dwdp: CostModel,
    lengths: Lengths,
    max_tokens: int,
    variation: float,
    pulls: Pulls | None = None,
) -> float:
    """Tokens per second and GPU of DWDP over DEP."""
    dice, count = random.Random(0), prompts_per_step(lengths, max_tokens)
    pulls = pulls or default_pulls(dwdp, SLICE_MIB)
    lockstep_s = independent_s = 0.0
    for _ in range(NUM_STEPS):
        steps = draw_steps(lengths, count, dep.group_size, variation, dice)
        lockstep_s += lockstep(dep, steps, FITTED["routing_skew"].value)
        independent_s += statistics.mean(dwdp_step(dwdp, step, pulls) for step in steps)
    return FITTED["end_to_end"].value * lockstep_s / independent_s


def dep_tokens_per_s(
    model: CostModel, lengths: Lengths, max_tokens: int, variation: float
) -> float:
    """Prompt tokens per second and GPU of DEP."""
    dice, count = random.Random(0), prompts_per_step(lengths, max_tokens)
    seconds = tokens = 0.0
    for _ in range(NUM_STEPS):
        steps = draw_steps(lengths, count, model.group_size, variation, dice)
        seconds += lockstep(model, steps, FITTED["routing_skew"].value)
        tokens += statistics.mean(step.num_tokens for step in steps)
    return tokens / seconds

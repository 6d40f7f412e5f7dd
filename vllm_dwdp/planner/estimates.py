"""What `plan` estimates: memory, break-even, gains over DEP in parts, crossover, redundancy. Pure."""

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.cost import CostModel, Step
from vllm_dwdp.transfer.mode_policy import LayerCosts

USABLE_MEMORY = 0.9
KV_RESERVE = 0.1
"""Of the memory, kept for the KV cache when spare memory is given away."""
ROUTING_SKEW = 1.1
"""Load of the busiest expert-parallel rank over the mean; an assumption."""
NUM_SLOTS = 2
ANY_STEP = 2**31
"""What the mode policy gives as the largest step where reading in place always wins."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What is served.

    Args:
        input_tokens, output_tokens: per request.
        variation: standard deviation of a rank's tokens per step over their mean.
        max_num_batched_tokens: vLLM's limit per step and rank.
        batch_size: sequences that decode together on a rank.
    """

    input_tokens: int
    output_tokens: int
    variation: float
    max_num_batched_tokens: int
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("input_tokens", "max_num_batched_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise DwdpConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1."
                )
        if self.output_tokens < 0:
            raise DwdpConfigError(f"--output-tokens {self.output_tokens} must not be negative.")
        if not 0 <= self.variation <= 1:
            raise DwdpConfigError(f"--variation {self.variation} must lie in [0, 1].")

    @property
    def prefill_step(self) -> Step:
        """A full one."""
        return Step.prefill(self.max_num_batched_tokens, self.input_tokens)

    @property
    def decode_step(self) -> Step:
        """At half of the answer."""
        return Step.decode(self.batch_size, self.input_tokens + self.output_tokens / 2)


def memory_bytes(model: CostModel) -> dict[str, float]:
    """Per rank: resident experts, slots, dense weights, and what is left for the KV cache."""
    shape = model.shape
    resident = shape.num_moe_layers * model.resident_experts * shape.expert_bytes
    usable = USABLE_MEMORY * model.hardware.memory_gb * 1e9
    sizes = {
        "resident experts": resident,
        "prefetch slots": NUM_SLOTS * model.remote_bytes,
        "dense weights": shape.dense_bytes,
    }
    return sizes | {"KV cache": usable - sum(sizes.values())}


def replica_kv_bytes(model: CostModel) -> float:
    """What a full copy of the weights leaves for the KV cache; negative if it does not fit."""
    usable = USABLE_MEMORY * model.hardware.memory_gb * 1e9
    return usable - model.shape.experts_bytes - model.shape.dense_bytes


def replica_fits(model: CostModel) -> bool:
    """Whether one accelerator holds all weights and still a tenth of its memory for the KV cache."""
    return replica_kv_bytes(model) >= KV_RESERVE * model.hardware.memory_gb * 1e9


def break_even_tokens(model: CostModel, input_tokens: int) -> int:
    """Smallest prefill step whose layers compute as long as the next layer's experts take."""

    def hides_the_copies(num_tokens: int) -> bool:
        step = Step.prefill(num_tokens, input_tokens)
        compute = model.layer(step, model.shape.num_experts).compute
        return compute + model.interference >= model.prefetch

    return _smallest(hides_the_copies, 1 << 20)


def synchronisation(group_size: int, variation: float, seed: int = 0) -> float:
    """Mean of the busiest rank's tokens over the mean rank's: what every DEP step waits for."""
    if variation == 0 or group_size == 1:
        return 1.0
    dice = random.Random(seed)
    half_width = min(1.0, variation * 3**0.5)
    ratios = []
    for _ in range(2000):
        loads = [dice.uniform(1 - half_width, 1 + half_width) for _ in range(group_size)]
        ratios.append(max(loads) / statistics.mean(loads))
    return statistics.mean(ratios)


def parts(model: CostModel, traffic: Traffic) -> dict[str, float]:
    """Seconds per layer of a full prefill step that DWDP saves (or loses, if negative) over DEP.

    They add up to the difference of the two layers with uneven lengths and routing.
    """
    step = traffic.prefill_step
    own, shared = model.layer(step, model.shape.num_experts), model.dep_compute(step)
    waiting = synchronisation(model.group_size, traffic.variation) - 1
    hidden = own.compute + model.interference
    return {
        "all-to-all saved": model.all_to_all(step),
        "synchronisation saved, lengths": waiting * own.before_experts,
        f"synchronisation saved, routing skew {ROUTING_SKEW}": (ROUTING_SKEW - 1) * shared.experts,
        "interference of copies": -model.interference,
        "exposed prefetch": min(0.0, hidden - model.prefetch),
        "experts read once per rank, not once per group": shared.experts - own.experts,
    }


def speedups(model: CostModel, traffic: Traffic) -> dict[str, float]:
    """DEP seconds over DWDP seconds of a full prefill step: balanced, with lengths, with skew."""
    saved = parts(model, traffic)
    dwdp = model.dwdp_layer(traffic.prefill_step)
    lengths = saved.pop("synchronisation saved, lengths")
    skew = saved.pop(f"synchronisation saved, routing skew {ROUTING_SKEW}")
    balanced = dwdp + sum(saved.values())
    return {
        "balanced": balanced / dwdp,
        "with varying lengths": (balanced + lengths) / dwdp,
        "with routing skew too": (balanced + lengths + skew) / dwdp,
    }


def direct_crossover(model: CostModel) -> int:
    """Steps of at most this many tokens should read in place; 0 if none, ANY_STEP if all."""
    num_remote = model.shape.num_experts - model.resident_experts
    if num_remote == 0:
        return 0
    link = model.hardware.link_gbps * 1e9
    return LayerCosts(
        num_experts=model.shape.num_experts,
        num_remote_experts=num_remote,
        experts_per_token=model.shape.experts_per_token,
        expert_bytes=int(model.shape.expert_bytes),
        copy_bytes_per_s=link * model.efficiency.link,
        direct_bytes_per_s=link * model.efficiency.direct,
        other_seconds=model.layer(Step.decode(1, 1024), 0).compute,
    ).direct_max_tokens


def redundancy(model: CostModel, traffic: Traffic) -> tuple[int, float, int]:
    """Experts that spare memory holds per layer and rank, the part of copies saved, the break-even."""
    spare_bytes = memory_bytes(model)["KV cache"] - KV_RESERVE * model.hardware.memory_gb * 1e9
    num_remote = model.shape.num_experts - model.resident_experts
    per_layer = model.shape.num_moe_layers * model.shape.expert_bytes
    spare = min(num_remote, int(max(0.0, spare_bytes) // per_layer))
    richer = replace(model, extra_experts=model.extra_experts + spare)
    saved = spare / num_remote if num_remote else 0.0
    return spare, saved, break_even_tokens(richer, traffic.input_tokens)


def _smallest(holds: Callable[[int], bool], largest: int) -> int:
    """The smallest number up to `largest` for which monotone `holds` is true, else `largest`."""
    low, high = 1, largest
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low

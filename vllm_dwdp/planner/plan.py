"""`vllm-dwdp plan`: does DWDP pay off for this model, machine and traffic? Reasons, ranges, origins."""

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.cost import CostModel, Step
from vllm_dwdp.transfer.mode_policy import LayerCosts

USABLE_MEMORY = 0.9
ROUTING_SKEW = 1.1
"""Load of the busiest expert-parallel rank over the mean; a published value for DeepSeek-R1."""
NUM_SLOTS = 2


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


@dataclass(frozen=True, kw_only=True)
class Line:
    """One statement: `low` and `high` are equal where there is no range."""

    topic: str
    quantity: str
    low: float
    high: float
    unit: str
    origin: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "topic": self.topic,
            "quantity": self.quantity,
            "low": self.low,
            "high": self.high,
            "unit": self.unit,
            "origin": self.origin,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Lines for the table and sentences for the reader."""

    lines: tuple[Line, ...]
    advice: tuple[str, ...]


def make_plan(model: CostModel, traffic: Traffic) -> Plan:
    """Everything that `vllm-dwdp plan` says."""
    lines = [
        *_memory_lines(model),
        *_time_lines(model, traffic),
        *_comparison_lines(model, traffic),
    ]
    return Plan(lines=tuple(lines), advice=tuple(_advice(model, traffic)))


def memory_bytes(model: CostModel) -> dict[str, float]:
    """Per rank: resident experts, slots, dense weights, and what is left for the KV cache."""
    shape = model.shape
    resident = shape.num_moe_layers * model.resident_experts * shape.expert_bytes
    usable = USABLE_MEMORY * model.hardware.memory_gb * 1e9
    parts = {
        "resident experts": resident,
        "prefetch slots": NUM_SLOTS * model.remote_bytes,
        "dense weights": shape.dense_bytes,
    }
    return parts | {"KV cache": usable - sum(parts.values())}


def replica_fits(model: CostModel) -> bool:
    """Whether one accelerator holds all weights and still a tenth of its memory for the KV cache."""
    weights = model.shape.experts_bytes + model.shape.dense_bytes
    return weights <= (USABLE_MEMORY - 0.1) * model.hardware.memory_gb * 1e9


def break_even_tokens(model: CostModel, input_tokens: int) -> int:
    """Smallest prefill step whose layers compute as long as the next layer's experts take."""

    def computes_long_enough(num_tokens: int) -> bool:
        step = Step.prefill(num_tokens, input_tokens)
        compute = model.layer(step, model.shape.num_experts).compute
        return compute / model.efficiency.beside_copies >= model.prefetch

    return _smallest(computes_long_enough, 1 << 20)


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


def speedups(model: CostModel, traffic: Traffic) -> dict[str, float]:
    """DEP seconds over DWDP seconds of a full prefill step: balanced, with lengths, with skew."""
    step = Step.prefill(traffic.max_num_batched_tokens, traffic.input_tokens)
    dwdp = model.dwdp_layer(step)
    compute = model.dep_compute(step)
    waiting = synchronisation(model.group_size, traffic.variation)
    skewed = compute.compute + (ROUTING_SKEW - 1) * compute.routed_experts
    transfer = model.all_to_all(step)
    return {
        "balanced": (compute.compute + transfer) / dwdp,
        "with varying lengths": (waiting * compute.compute + transfer) / dwdp,
        "and routing skew": (waiting * skewed + transfer) / dwdp,
    }


def direct_crossover(model: CostModel) -> int:
    """Steps of at most this many tokens should read in place."""
    link = model.hardware.link_gbps * 1e9
    other = model.layer(Step.decode(1, 1024), 0).compute
    return LayerCosts(
        num_experts=model.shape.num_experts,
        num_remote_experts=model.shape.num_experts - model.resident_experts,
        experts_per_token=model.shape.experts_per_token,
        expert_bytes=int(model.shape.expert_bytes),
        copy_bytes_per_s=link * model.efficiency.link,
        direct_bytes_per_s=link * model.efficiency.direct,
        other_seconds=other,
    ).direct_max_tokens


def _memory_lines(model: CostModel) -> list[Line]:
    parts = memory_bytes(model)
    lines = [
        _line("memory per rank", name, value / 1e9, "GB", "spec") for name, value in parts.items()
    ]
    tokens = max(0.0, parts["KV cache"]) / model.shape.kv_bytes_per_token
    weights = model.shape.experts_bytes + model.shape.dense_bytes
    return [
        *lines,
        _line("memory per rank", "tokens that fit the KV cache", tokens, "tokens", "spec"),
        _line("memory per rank", "a full replica's weights", weights / 1e9, "GB", "spec"),
    ]


def _time_lines(model: CostModel, traffic: Traffic) -> list[Line]:
    origin = model.efficiency.origin
    step = Step.prefill(traffic.max_num_batched_tokens, traffic.input_tokens)
    compute = model.layer(step, model.shape.num_experts).compute
    decode = Step.decode(traffic.batch_size, traffic.input_tokens + traffic.output_tokens / 2)
    layers = model.shape.num_moe_layers
    resident = model.layer(decode, model.shape.num_experts).compute
    return [
        _line("time", "prefetch per layer", model.prefetch * 1e3, "ms", origin),
        _line("time", "prefetch per step", model.prefetch * layers * 1e3, "ms", origin),
        _line("time", "compute per layer, full prefill step", compute * 1e3, "ms", origin),
        _line("time", "break-even tokens per step and rank",
              break_even_tokens(model, traffic.input_tokens), "tokens", origin),
        _line("time", "direct up to", direct_crossover(model), "tokens", origin),
        _line("decode", "step, DWDP prefetch", model.dwdp_layer(decode) * layers * 1e3, "ms", origin),
        _line("decode", "step, DEP balanced", model.dep_layer(decode) * layers * 1e3, "ms", origin),
        _line("decode", "step, all experts resident", resident * layers * 1e3, "ms", origin),
    ]  # fmt: skip


def _comparison_lines(model: CostModel, traffic: Traffic) -> list[Line]:
    origin = model.efficiency.origin
    values = speedups(model, traffic)
    step = Step.prefill(traffic.max_num_batched_tokens, traffic.input_tokens)
    compute = model.layer(step, model.shape.num_experts).compute
    slowed = compute / model.efficiency.beside_copies
    dwdp = model.dwdp_layer(step)
    waiting = synchronisation(model.group_size, traffic.variation) - 1
    parts = {
        "all-to-all saved": model.all_to_all(step),
        "synchronisation saved": waiting * model.dep_compute(step).compute,
        "interference of copies": compute - slowed,
        "exposed prefetch": min(0.0, slowed - model.prefetch),
    }
    speed = Line(
        topic="DWDP over DEP, prefill",
        quantity="throughput",
        low=min(values.values()),
        high=max(values.values()),
        unit="x",
        origin=origin,
    )
    return [
        speed,
        *(
            _line("DWDP over DEP, prefill", name, value / dwdp * 100, "% of a DWDP layer", origin)
            for name, value in parts.items()
        ),
    ]


def _advice(model: CostModel, traffic: Traffic) -> list[str]:
    said = []
    parts = memory_bytes(model)
    if parts["KV cache"] <= 0:
        said.append(
            f"It does not fit: a rank lacks {-parts['KV cache'] / 1e9:.0f} GB. Use more ranks per "
            "group or smaller experts (quantisation)."
        )
    if replica_fits(model):
        said.append(
            "A full replica fits one accelerator: plain data parallelism (dwdp mode 'replica') is "
            "faster. DWDP pays off here only if room for the KV cache is the point."
        )
    needed = break_even_tokens(model, traffic.input_tokens)
    if traffic.max_num_batched_tokens < needed:
        said.append(
            f"max_num_batched_tokens={traffic.max_num_batched_tokens} is below the break-even of "
            f"{needed} tokens: every prefill step waits for its experts. Raise it, share over fewer "
            "ranks or hold more experts per rank (experts_per_rank)."
        )
    if traffic.output_tokens * 4 > traffic.input_tokens:
        said.append(
            "The traffic is decode-heavy, and a decode step computes too little to hide the copies: "
            "separate prefill from decode, with DWDP on the prefill side."
        )
    spare = int(
        max(0.0, parts["KV cache"] - 0.1 * model.hardware.memory_gb * 1e9)
        // (model.shape.num_moe_layers * model.shape.expert_bytes)
    )
    remote = model.shape.num_experts - model.resident_experts
    if spare > 0 and remote:
        gain = min(spare, remote) / remote
        said.append(
            f"Spare memory would hold {min(spare, remote)} more experts per layer and rank, and save "
            f"{100 * gain:.0f} % of the copies (experts_per_rank="
            f"{model.resident_experts + min(spare, remote)}), at the price of KV cache."
        )
    low = min(speedups(model, traffic).values())
    if low < 1:
        said.append(
            f"With balanced load DWDP is slower than DEP here ({low:.2f}x); it pays off only by what "
            "uneven lengths and routing cost DEP."
        )
    return said


def _line(topic: str, quantity: str, value: float, unit: str, origin: str) -> Line:
    return Line(topic=topic, quantity=quantity, low=value, high=value, unit=unit, origin=origin)


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

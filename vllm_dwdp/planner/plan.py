"""`vllm-dwdp plan`: does DWDP pay off for this model, machine and traffic? Figures and advice."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.estimates import (
    COMPUTE,
    EVERYTHING,
    LINK,
    Tokens,
    assumptions,
    auto_step,
    break_even_tokens,
    decode_steps,
    direct_crossover,
    parts,
    redundancy,
    speedups,
)
from vllm_dwdp.planner.kv_cache import KvCache
from vllm_dwdp.planner.memory import (
    kv_tokens,
    memory_bytes,
    mtp_bytes,
    replica_fits,
    replica_kv_bytes,
)
from vllm_dwdp.planner.traffic import Traffic

DECODE_HEAVY = 4
"""A request is decode-heavy from one generated token per so many prompt tokens."""
SLOWER = 1.1
"""Decode time over expert parallelism's from which prefill should be separated from it."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of the table: `low` and `high` are equal where there is no range.

    Args:
        low, high: None where there is no such number, and `reason` says why.
        origin: `config` (counted from the model's config), `spec` (also the data sheet's memory),
            `peak`, `default`, `calibrated` or `part default`.
    """

    topic: str
    quantity: str
    low: float | None
    high: float | None
    unit: str
    origin: str
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Figures for the table and sentences for the reader."""

    figures: tuple[Figure, ...]
    advice: tuple[str, ...]
    assumptions: tuple[str, ...]

    def and_then(self, more: "Plan") -> "Plan":
        """Say more after it."""
        return Plan(
            figures=self.figures + more.figures,
            advice=self.advice + more.advice,
            assumptions=self.assumptions + more.assumptions,
        )


def make_plan(model: CostModel, traffic: Traffic) -> Plan:
    """Say everything that `vllm-dwdp plan` shows."""
    figures = (
        *_memory(model, traffic),
        *_times(model, traffic),
        *_comparison(model, traffic),
        *_decode(model, traffic),
        *_redundancy(model, traffic),
    )
    return Plan(
        figures=figures,
        advice=tuple(advise(model, traffic)),
        assumptions=tuple(assumptions(model)),
    )


def _memory(model: CostModel, traffic: Traffic) -> list[Figure]:
    topic, sizes = "memory per rank", memory_bytes(model)
    context = traffic.input_tokens + traffic.output_tokens
    weights = model.shape.experts_bytes + model.shape.dense_bytes
    return [
        _figure(topic, "resident experts", sizes.experts / 1e9, "GB", "config"),
        _figure(topic, "prefetch slots", sizes.slots / 1e9, "GB", "config"),
        _figure(topic, "dense weights", sizes.dense / 1e9, "GB", "config"),
        *_adapters(topic, model),
        *_drafting(topic, model),
        _figure(topic, "KV cache", sizes.kv_cache / 1e9, "GB", "spec"),
        *_per_sequence(topic, model.shape.kv_cache),
        *_fitting(topic, model, context),
        _figure(topic, "weights of a full replica", weights / 1e9, "GB", "config"),
        _figure(topic, "KV cache of a full replica", replica_kv_bytes(model) / 1e9, "GB", "spec"),
    ]  # fmt: skip


def _adapters(topic: str, model: CostModel) -> Iterator[Figure]:
    if slots := model.adapters.number:
        what = f"{slots} slots for LoRA adapters of rank {model.adapters.rank}, at most"
        yield _figure(topic, what, model.adapter_bytes / 1e9, "GB", "config")


def _drafting(topic: str, model: CostModel) -> Iterator[Figure]:
    if drafting := mtp_bytes(model):
        what = "experts and slots of its MTP layers, if they draft"
        yield _figure(topic, what, drafting / 1e9, "GB", "config")


def _per_sequence(topic: str, cache: KvCache) -> Iterator[Figure]:
    """Say what grows with a sequence, and what every sequence needs besides."""
    num = f"{cache.num_full} of {cache.num_layers} layers"
    yield _figure(topic, f"KV cache per token, {num}", cache.token_bytes / 1e3, "kB", "config")
    if cache.window_bytes:
        what = f"KV cache per sequence, windows of {cache.window_tokens:,} tokens, at most"
        yield _figure(topic, what, cache.window_bytes / 1e6, "MB", "config")
    if cache.state_bytes:
        what = f"KV cache per sequence, states of {cache.num_states} layers"
        yield _figure(topic, what, cache.state_bytes / 1e6, "MB", "config")


def _fitting(topic: str, model: CostModel, context_tokens: int) -> Iterator[Figure]:
    fitting = kv_tokens(model, context_tokens)
    if math.isfinite(fitting):
        yield _figure(topic, "tokens that fit the KV cache", fitting, "tokens", "spec")


def _times(model: CostModel, traffic: Traffic) -> list[Figure]:
    def origin(*names: str) -> str:
        return model.efficiency.origin(*names)

    topic, layers = "prefill", model.shape.num_moe_layers
    step = traffic.prefill_step
    compute = model.layer(step, model.shape.num_experts).compute
    return [
        _figure(topic, "prefetch per layer", model.prefetch * 1e3, "ms", origin(*LINK)),
        _figure(topic, "prefetch per step", model.prefetch * layers * 1e3, "ms", origin(*LINK)),
        _figure(topic, "compute per MoE layer, full step", compute * 1e3, "ms", origin(*COMPUTE)),
        _tokens(topic, "break-even tokens per step and rank",
                break_even_tokens(model, traffic.input_tokens), origin(*EVERYTHING)),
        _tokens(topic, "read in place (direct) up to", direct_crossover(model),
                model.efficiency.origin(*COMPUTE, *LINK, "direct", assumed=True)),
    ]  # fmt: skip


def _comparison(model: CostModel, traffic: Traffic) -> list[Figure]:
    topic, values = "prefill, DWDP over DEP", speedups(model, traffic)
    dwdp, saved = auto_step(model, traffic.prefill_step), parts(model, traffic)
    used = {field for part in saved for field in part.uses}
    origin = model.efficiency.origin(*used, assumed=True)
    low, high = min(values.values()), max(values.values())
    return [
        Figure(topic=topic, quantity="throughput, range", low=low, high=high, unit="x", origin=origin),
        *(_figure(topic, f"throughput, {name}", value, "x", origin) for name, value in values.items()),
        *(
            _figure(topic, part.title, 100 * seconds / dwdp, "% of a DWDP step",
                    model.efficiency.origin(*part.uses, assumed=part.assumed))
            for part, seconds in saved.items()
        ),
    ]  # fmt: skip


def _decode(model: CostModel, traffic: Traffic) -> list[Figure]:
    topic = f"decode, {traffic.batch_size} sequences"
    return [
        _figure(topic, f"step, {way.title}", 1e3 * seconds, "ms",
                model.efficiency.origin(*way.uses, assumed=True))
        for way, seconds in decode_steps(model, traffic.decode_step).items()
    ]  # fmt: skip


def _redundancy(model: CostModel, traffic: Traffic) -> list[Figure]:
    topic = "spare memory as redundancy"
    spare, saved, tokens = redundancy(model, traffic)
    return [
        _figure(topic, "more experts per layer and rank", spare, "experts", "spec"),
        _figure(topic, "of the copies saved", 100 * saved, "%", "spec"),
        _tokens(topic, "break-even tokens then", tokens, model.efficiency.origin(*EVERYTHING)),
    ]


def _figure(topic: str, quantity: str, value: float, unit: str, origin: str) -> Figure:
    return Figure(topic=topic, quantity=quantity, low=value, high=value, unit=unit, origin=origin)


def _tokens(topic: str, quantity: str, tokens: Tokens, origin: str) -> Figure:
    return Figure(
        topic=topic,
        quantity=quantity,
        low=tokens.number,
        high=tokens.number,
        unit="tokens",
        origin=origin,
        reason=tokens.instead,
    )


def advise(model: CostModel, traffic: Traffic) -> Iterator[str]:
    """Say every sentence that holds for this model, machine and traffic."""
    yield from _about_memory(model)
    yield from kv_shortage(model, int(traffic.decode_step.mean_keys), traffic.batch_size)
    yield from _about_steps(model, traffic)
    yield from _about_gains(model, traffic)


def lacking_memory(model: CostModel) -> Iterator[str]:
    """Say where the weights of a rank do not fit."""
    left = memory_bytes(model).kv_cache
    if left <= 0:
        yield (
            f"It does not fit: a rank lacks {-left / 1e9:.0f} GB. Use more ranks per group or smaller "
            "experts (quantisation)."
        )


def kv_shortage(model: CostModel, context_tokens: int, num_sequences: int) -> Iterator[str]:
    """Say where sequences need more KV cache than a rank has beside its weights."""
    room, needed = kv_tokens(model, context_tokens), num_sequences * context_tokens
    if 0 < room < needed:
        yield (
            f"{num_sequences:,} sequence{'s' * (num_sequences > 1)} of {context_tokens:,} tokens need a "
            f"KV cache of {needed:,} tokens, and {room:,.0f} fit a rank: the figures need more than "
            "there is."
        )


def _about_memory(model: CostModel) -> Iterator[str]:
    yield from lacking_memory(model)
    num_gpus = model.hardware.num_gpus
    where = "one accelerator" if num_gpus == 1 else f"the {num_gpus} GPUs of a rank"
    if replica_fits(model):
        yield (
            f"A full replica fits {where}: plain data parallelism (dwdp mode 'replica') is "
            "faster. DWDP pays off here only if room for the KV cache is the point: "
            f"{memory_bytes(model).kv_cache / 1e9:.0f} GB instead of "
            f"{replica_kv_bytes(model) / 1e9:.0f} GB per rank."
        )


def _about_steps(model: CostModel, traffic: Traffic) -> Iterator[str]:
    needed = break_even_tokens(model, traffic.input_tokens)
    if needed.number is not None and traffic.max_num_batched_tokens < needed.number:
        yield (
            f"max_num_batched_tokens={traffic.max_num_batched_tokens} is below the break-even of "
            f"{needed.number} tokens: every prefill step waits for its experts. Raise it, share over "
            "fewer ranks or hold more experts per rank (experts_per_rank)."
        )
    if needed.instead.startswith("never"):
        yield (
            "No prefill step computes long enough to hide its copies: share over fewer ranks, hold more "
            "experts per rank (experts_per_rank), or use a faster link."
        )
    step = traffic.decode_step
    slower = auto_step(model, step) / model.dep_step(step)
    if traffic.output_tokens * DECODE_HEAVY > traffic.input_tokens and slower > SLOWER:
        yield (
            "The traffic is decode-heavy, and a decode step computes too little to hide the copies "
            f"({slower:.1f}x the time of expert parallelism): separate prefill from decode, with DWDP "
            "on the prefill side."
        )


def _about_gains(model: CostModel, traffic: Traffic) -> Iterator[str]:
    values = speedups(model, traffic)
    low, high = min(values.values()), max(values.values())
    if high < 1:
        yield f"DWDP is slower than DEP here, {low:.2f} to {high:.2f}x: keep expert parallelism."
    elif round(low, 2) < 1:
        yield (
            f"With balanced load DWDP is slower than DEP here ({low:.2f}x); it pays off only by what "
            "uneven lengths and routing cost DEP."
        )
    else:
        yield f"DWDP is {low:.2f} to {high:.2f}x as fast as DEP in prefill."
    spare, saved, tokens = redundancy(model, traffic)
    if spare:
        yield (
            f"Spare memory would hold {spare} more experts per layer and rank (experts_per_rank="
            f"{model.resident_experts + spare}): {100 * saved:.0f} % of the copies less"
            f"{_break_even(tokens)}, at the price of KV cache."
        )


def _break_even(tokens: Tokens) -> str:
    return "" if tokens.number is None else f", break-even at {tokens.number} tokens"

"""`vllm-dwdp plan`: does DWDP pay off for this model, machine and traffic? Ranges, reasons, origins."""

from dataclasses import asdict, dataclass
from typing import Any

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.advice import advise
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.estimates import (
    LENGTHS,
    SKEW,
    Tokens,
    Traffic,
    assumptions,
    auto_step,
    break_even_tokens,
    decode_steps,
    direct_crossover,
    kv_tokens,
    memory_bytes,
    parts,
    redundancy,
    replica_kv_bytes,
    speedups,
)

_LINEAR = ("dense_gemm", "attention", "other_passes")
_COMPUTE = (*_LINEAR, "grouped_gemm", "memory")
_PREFETCH = ("link",)
_ALL = (*_COMPUTE, *_PREFETCH, "beside_copies")
_USED = {
    "all-to-all saved": _PREFETCH,
    LENGTHS: _LINEAR,
    SKEW: ("grouped_gemm", "memory"),
    "interference of copies": ("beside_copies", *_PREFETCH),
    "exposed prefetch": _ALL,
    "reading peers in place": (*_COMPUTE, "direct"),
    "experts read once per rank, not once per group": ("grouped_gemm", "memory"),
    "DWDP prefetch": _ALL,
    "DWDP direct": (*_COMPUTE, "direct"),
    "DEP balanced": (*_COMPUTE, *_PREFETCH),
    "full replica": _COMPUTE,
}
"""Efficiencies that a figure uses."""
_ASSUMED = frozenset({"all-to-all saved", SKEW, "experts read once per rank, not once per group"})
"""Parts that also rest on `estimates.assumptions`."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One statement: `low` and `high` are equal where there is no range.

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
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Lines for the table and sentences for the reader."""

    lines: tuple[Line, ...]
    advice: tuple[str, ...]
    assumptions: tuple[str, ...]


def make_plan(model: CostModel, traffic: Traffic) -> Plan:
    """Everything that `vllm-dwdp plan` says.

    Raises:
        DwdpConfigError: more experts per rank than there are, or fewer than two ranks.
    """
    if model.group_size < 2:
        raise DwdpConfigError(
            f"--ranks {model.group_size} must be at least 2: one rank shares nothing."
        )
    if model.extra_experts + model.shape.num_experts // model.group_size > model.shape.num_experts:
        raise DwdpConfigError(
            f"--experts-per-rank is above the {model.shape.num_experts} experts of a layer."
        )
    lines = [
        *_memory_lines(model, traffic),
        *_time_lines(model, traffic),
        *_comparison_lines(model, traffic),
        *_decode_lines(model, traffic),
        *_redundancy_lines(model, traffic),
    ]
    return Plan(
        lines=tuple(lines),
        advice=tuple(advise(model, traffic)),
        assumptions=tuple(assumptions(model)),
    )


def _memory_lines(model: CostModel, traffic: Traffic) -> list[Line]:
    topic, sizes = "memory per rank", memory_bytes(model)
    context = traffic.input_tokens + traffic.output_tokens
    per_token = model.shape.kv_bytes_per_token(context)
    weights = model.shape.experts_bytes + model.shape.dense_bytes
    lines = [
        _line(topic, name, value / 1e9, "GB", "config" if name != "KV cache" else "spec")
        for name, value in sizes.items()
    ]
    return [
        *lines,
        _line(topic, "KV cache per token", per_token / 1e3, "kB", "config"),
        _line(topic, "tokens that fit the KV cache", kv_tokens(model, context), "tokens", "spec"),
        _line(topic, "weights of a full replica", weights / 1e9, "GB", "config"),
        _line(topic, "KV cache of a full replica", replica_kv_bytes(model) / 1e9, "GB", "spec"),
    ]  # fmt: skip


def _time_lines(model: CostModel, traffic: Traffic) -> list[Line]:
    def origin(*names: str) -> str:
        return model.efficiency.origin(*names)

    topic, layers = "prefill", model.shape.num_moe_layers
    step = traffic.prefill_step
    compute = model.layer(step, model.shape.num_experts).compute
    return [
        _line(topic, "prefetch per layer", model.prefetch * 1e3, "ms", origin(*_PREFETCH)),
        _line(topic, "prefetch per step", model.prefetch * layers * 1e3, "ms", origin(*_PREFETCH)),
        _line(topic, "compute per MoE layer, full step", compute * 1e3, "ms", origin(*_COMPUTE)),
        _tokens(topic, "break-even tokens per step and rank",
                break_even_tokens(model, traffic.input_tokens), origin(*_ALL)),
        _tokens(topic, "read in place (direct) up to", direct_crossover(model),
                model.efficiency.origin(*_COMPUTE, *_PREFETCH, "direct", assumed=True)),
    ]  # fmt: skip


def _comparison_lines(model: CostModel, traffic: Traffic) -> list[Line]:
    topic, values = "prefill, DWDP over DEP", speedups(model, traffic)
    dwdp, saved = auto_step(model, traffic.prefill_step), parts(model, traffic)
    used = {field for name in saved for field in _USED[name]}
    origin = model.efficiency.origin(*used, assumed=True)
    low, high = min(values.values()), max(values.values())
    return [
        Line(topic=topic, quantity="throughput, range", low=low, high=high, unit="x", origin=origin),
        *(_line(topic, f"throughput, {name}", value, "x", origin) for name, value in values.items()),
        *(
            _line(topic, name, 100 * value / dwdp, "% of a DWDP step",
                  model.efficiency.origin(*_USED[name], assumed=name in _ASSUMED))
            for name, value in saved.items()
        ),
    ]  # fmt: skip


def _decode_lines(model: CostModel, traffic: Traffic) -> list[Line]:
    topic = f"decode, {traffic.batch_size} sequences"
    return [
        _line(topic, f"step, {name}", 1e3 * seconds, "ms",
              model.efficiency.origin(*_USED[name], assumed=True))
        for name, seconds in decode_steps(model, traffic.decode_step).items()
    ]  # fmt: skip


def _redundancy_lines(model: CostModel, traffic: Traffic) -> list[Line]:
    topic = "spare memory as redundancy"
    spare, saved, tokens = redundancy(model, traffic)
    return [
        _line(topic, "more experts per layer and rank", spare, "experts", "spec"),
        _line(topic, "of the copies saved", 100 * saved, "%", "spec"),
        _tokens(topic, "break-even tokens then", tokens, model.efficiency.origin(*_ALL)),
    ]


def _line(topic: str, quantity: str, value: float, unit: str, origin: str) -> Line:
    return Line(topic=topic, quantity=quantity, low=value, high=value, unit=unit, origin=origin)


def _tokens(topic: str, quantity: str, tokens: Tokens, origin: str) -> Line:
    return Line(
        topic=topic,
        quantity=quantity,
        low=tokens.number,
        high=tokens.number,
        unit="tokens",
        origin=origin,
        reason=tokens.instead,
    )

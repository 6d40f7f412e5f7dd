"""`vllm-dwdp plan`: does DWDP pay off for this model, machine and traffic? Ranges, reasons, origins."""

from dataclasses import asdict, dataclass
from typing import Any

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.advice import advise
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.estimates import (
    ROUTING_SKEW,
    Traffic,
    break_even_tokens,
    direct_crossover,
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


@dataclass(frozen=True, kw_only=True)
class Line:
    """One statement: `low` and `high` are equal where there is no range.

    Args:
        origin: `config` (counted from the model's config), `spec` (also the data sheet's memory),
            `peak`, `default`, `calibrated` or `part default`.
    """

    topic: str
    quantity: str
    low: float
    high: float
    unit: str
    origin: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Lines for the table and sentences for the reader."""

    lines: tuple[Line, ...]
    advice: tuple[str, ...]


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
    return Plan(lines=tuple(lines), advice=tuple(advise(model, traffic)))


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
        _line(topic, "tokens that fit the KV cache", max(0.0, sizes["KV cache"]) / per_token,
              "tokens", "spec"),
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
        _line(topic, "compute per layer, full step", compute * 1e3, "ms", origin(*_COMPUTE)),
        _line(topic, "break-even tokens per step and rank",
              break_even_tokens(model, traffic.input_tokens), "tokens", origin(*_ALL)),
        _line(topic, "read in place (direct) up to", direct_crossover(model), "tokens",
              origin(*_COMPUTE, *_PREFETCH, "direct")),
    ]  # fmt: skip


def _comparison_lines(model: CostModel, traffic: Traffic) -> list[Line]:
    topic, values = "prefill, DWDP over DEP", speedups(model, traffic)
    dwdp = model.dwdp_layer(traffic.prefill_step)
    saved = parts(model, traffic)
    lines = [
        Line(
            topic=topic,
            quantity="throughput, range",
            low=min(values.values()),
            high=max(values.values()),
            unit="x",
            origin=model.efficiency.origin(*_ALL),
        )
    ]
    lines += [
        _line(topic, f"throughput, {name}", value, "x", model.efficiency.origin(*_ALL))
        for name, value in values.items()
    ]
    used = {
        "all-to-all saved": _PREFETCH,
        "synchronisation saved, lengths": _LINEAR,
        f"synchronisation saved, routing skew {ROUTING_SKEW}": ("grouped_gemm", "memory"),
        "interference of copies": ("beside_copies", *_PREFETCH),
        "exposed prefetch": _ALL,
        "experts read once per rank, not once per group": ("grouped_gemm", "memory"),
    }
    return lines + [
        _line(topic, name, 100 * value / dwdp, "% of a DWDP layer",
              model.efficiency.origin(*used[name]))
        for name, value in saved.items()
    ]  # fmt: skip


def _decode_lines(model: CostModel, traffic: Traffic) -> list[Line]:
    topic, layers = f"decode, {traffic.batch_size} sequences", model.shape.num_moe_layers
    step = traffic.decode_step
    dense = model.dense_layers(step).compute
    resident = model.layer(step, model.shape.num_experts).compute
    touched = model.touched_experts(step.num_tokens, model.shape.num_experts)
    remote_share = 1.0 - model.resident_experts / model.shape.num_experts
    link = model.hardware.link_gbps * 1e9 * model.efficiency.direct
    # Resident experts come from memory, the others from the peers, as the kernel gets to them.
    own = model.layer(step, model.resident_experts).compute
    direct = own + touched * remote_share * model.shape.expert_bytes / link
    values = {
        "step, DWDP prefetch": (model.dwdp_layer(step), _ALL),
        "step, DWDP direct": (direct, (*_COMPUTE, "direct")),
        "step, DEP balanced": (model.dep_layer(step), (*_COMPUTE, *_PREFETCH)),
        "step, full replica": (resident, _COMPUTE),
    }
    return [
        _line(topic, name, (layers * value + dense) * 1e3, "ms", model.efficiency.origin(*used))
        for name, (value, used) in values.items()
    ]


def _redundancy_lines(model: CostModel, traffic: Traffic) -> list[Line]:
    topic = "spare memory as redundancy"
    spare, saved, tokens = redundancy(model, traffic)
    return [
        _line(topic, "more experts per layer and rank", spare, "experts", "spec"),
        _line(topic, "of the copies saved", 100 * saved, "%", "spec"),
        _line(topic, "break-even tokens then", tokens, "tokens", model.efficiency.origin(*_ALL)),
    ]


def _line(topic: str, quantity: str, value: float, unit: str, origin: str) -> Line:
    return Line(topic=topic, quantity=quantity, low=value, high=value, unit=unit, origin=origin)

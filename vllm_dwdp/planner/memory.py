"""What the memory of a rank holds, and what is left for the KV cache. Pure."""

import math
from typing import NamedTuple

from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.prefetch.schedule import ring_slots

USABLE_MEMORY = 0.9


KV_RESERVE = 0.1
"""Of the memory, kept for the KV cache when spare memory is given away."""


class RankMemory(NamedTuple):
    """The memory of a rank in bytes; `kv_cache` is what is left, negative if the rest does not fit."""

    experts: float
    slots: float
    dense: float
    adapters: float
    kv_cache: float


def memory_bytes(model: CostModel) -> RankMemory:
    """Divide the memory of a rank."""
    shape = model.shape
    experts = shape.num_banks * model.resident_experts * shape.layer_expert_bytes
    slots = ring_slots(shape.num_expert_layers) * model.slot_bytes
    weights = (experts, slots, shape.dense_bytes, model.adapter_bytes)
    return RankMemory(*weights, usable_bytes(model) - sum(weights))


def usable_bytes(model: CostModel) -> float:
    """Return what vLLM uses of the memory of a rank."""
    return USABLE_MEMORY * model.hardware.memory_gb * 1e9


def mtp_bytes(model: CostModel) -> float:
    """Return what layers that draft take besides: experts, and a ring of their own; 0 without any."""
    layers = model.shape.num_mtp_layers
    experts = layers * model.resident_experts * model.shape.expert_bytes
    return experts + ring_slots(layers) * model.slot_bytes


def replica_kv_bytes(model: CostModel) -> float:
    """Return what a full copy of the weights leaves for the KV cache; negative if it does not fit."""
    left = usable_bytes(model) - model.adapter_bytes
    return left - model.shape.experts_bytes - model.shape.dense_bytes


def expert_parallel_kv_bytes(model: CostModel) -> float:
    """Return what an even share of the experts, without slots, leaves; negative if it does not fit."""
    left = usable_bytes(model) - model.adapter_bytes
    return left - model.shape.experts_bytes / model.group_size - model.shape.dense_bytes


def replica_fits(model: CostModel) -> bool:
    """Say whether one accelerator holds all weights and still a tenth of its memory for the KV cache."""
    return replica_kv_bytes(model) >= KV_RESERVE * model.hardware.memory_gb * 1e9


def kv_tokens(model: CostModel, context_tokens: float) -> float:
    """Return the tokens of sequences of `context_tokens` that fit a rank; `inf` where none is kept."""
    room = max(0.0, memory_bytes(model).kv_cache)
    kept = model.shape.kv_bytes_per_token(context_tokens)
    return room / kept if kept else math.inf

"""The memory that vLLM makes at a start for LoRA adapters: slots for all layers. Pure.

A slot has two matrices for each matrix of the model: `[rank, inputs]` and `[outputs, rank]`. Over the
GPUs of a rank one of the two is divided as the model's matrix is, and the other is on each of them.
Every rank has all of it: adapters are not shared. Follows vllm/lora/layers.
"""

from dataclasses import dataclass
from typing import NamedTuple

from vllm_dwdp.planner.checkpoint import ConfigFields
from vllm_dwdp.planner.feed_forward import Widths, widths
from vllm_dwdp.planner.kv_cache import KV_HEADS
from vllm_dwdp.planner.layer_kinds import LayerKind, layer_kinds

WEIGHT_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What vLLM is told: `--max-loras` and `--max-lora-rank`; none without adapters."""

    number: int = 0
    rank: int = 16


NO_SLOTS = Slots()


class AdapterSize(NamedTuple):
    """Weights of a slot for each unit of its rank.

    Args:
        whole: on each GPU of a rank.
        divided: over them.
    """

    whole: int
    divided: int

    def plus(self, other: "AdapterSize") -> "AdapterSize":
        """Add both."""
        return AdapterSize(self.whole + other.whole, self.divided + other.divided)

    def times(self, number: int) -> "AdapterSize":
        """Multiply both."""
        return AdapterSize(number * self.whole, number * self.divided)

    def slot_bytes(self, slots: Slots, num_gpus: int) -> int:
        """Return the bytes of all slots on all GPUs of a rank."""
        weights = num_gpus * self.whole + self.divided
        return slots.number * slots.rank * weights * WEIGHT_BYTES


NOTHING = AdapterSize(0, 0)


def adapter_size(
    fields: ConfigFields, num_layers: int, with_experts: tuple[int, ...], num_experts: int
) -> AdapterSize:
    """Count what a slot takes, at most.

    Embedding and head are counted, which some families do not adapt; of experts all three matrices,
    where some families have one first half for two. Layers that keep a state are counted without it.
    """
    size, hidden = widths(fields), fields.first("hidden_size")
    vocabulary = fields.first("vocab_size")
    total = AdapterSize(2 * (hidden + vocabulary), 0)
    routed = _feed_forward(size.matrices, size.latent, size.expert).times(num_experts)
    shared = _feed_forward(size.matrices, hidden, size.shared)
    router = AdapterSize(hidden + num_experts, 0)
    total = total.plus(routed.plus(shared).plus(router).times(len(with_experts)))
    dense = _feed_forward(size.matrices, hidden, size.dense)
    kinds = layer_kinds(fields, num_layers)
    attention = _attention(fields, size).times(fields.attentions_per_layer)
    for layer, kind in enumerate(kinds):
        if kind not in (LayerKind.STATE, LayerKind.NONE):
            total = total.plus(attention)
        if layer not in with_experts and (LayerKind.NONE not in kinds or kind is LayerKind.NONE):
            total = total.plus(dense)
    return total


def _feed_forward(matrices: int, outside: int, inside: int) -> AdapterSize:
    """Return a feed-forward's matrices, each between the width outside and the one inside."""
    return AdapterSize(matrices * outside, matrices * inside) if inside else NOTHING


def _attention(fields: ConfigFields, size: Widths) -> AdapterSize:
    heads, hidden = fields.first("num_attention_heads"), size.hidden
    if fields.config.get("kv_lora_rank") is not None:
        return _latent_attention(fields, heads, hidden)
    head = fields.first("head_dim", default=max(1, hidden // heads), low=1)
    groups = fields.first(*KV_HEADS, default=heads)
    queries = heads * head
    return AdapterSize(3 * hidden + hidden, queries + 2 * groups * head + queries)


def _latent_attention(fields: ConfigFields, heads: int, hidden: int) -> AdapterSize:
    nope, rope = fields.first("qk_nope_head_dim"), fields.first("qk_rope_head_dim", low=0)
    value, latent = fields.first("v_head_dim"), fields.first("kv_lora_rank")
    query_rank = fields.first("q_lora_rank", default=0)
    queries = AdapterSize(query_rank or hidden, heads * (nope + rope))
    if query_rank:
        queries = queries.plus(AdapterSize(hidden + query_rank, 0))
    keys = AdapterSize(hidden + latent + rope + latent, heads * (nope + value))
    return queries.plus(keys).plus(AdapterSize(hidden, heads * value))

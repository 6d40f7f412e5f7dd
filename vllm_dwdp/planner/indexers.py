"""Sparse attention: an indexer scores what a query may see, and the best are attended to. Pure.

DeepSeek-V3.2's has keys in FP8, one per token; layers may share one (GLM-5), or its keys stand for pools
of tokens (GLM-5.3-Flash). MiniMax-M3's has keys in bf16 and chooses blocks of tokens, in the layers that
its config lists.
"""

from dataclasses import dataclass

from vllm_dwdp.planner.cache_parts import index_bytes
from vllm_dwdp.planner.checkpoint import ConfigFields

BF16_BYTES = 2
KEY_BITS = 8


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """What chooses for one layer; its GPUs each do all of it, if nothing else is said.

    Args:
        most_seen: the tokens that a query attends to.
        key_bytes: of a key; 0 where the layer takes what an earlier one chose.
        dim: sum over its heads of their sizes.
        bits: that its products run in.
        tokens_per_key: that share a key.
        waiting_bytes: of a token of a pool that is not full.
        params: its linear weights.
    """

    most_seen: int
    key_bytes: int = 0
    dim: int = 0
    bits: int = KEY_BITS
    tokens_per_key: int = 1
    waiting_bytes: int = 0
    params: int = 0


def indexer_of(fields: ConfigFields, layer: int, num_layers: int) -> Indexer | None:
    """Return the indexer of a layer; None where a query attends to all that it may see."""
    sparse = fields.config.get("sparse_attention_config")
    if isinstance(sparse, dict):
        return _of_blocks(fields, ConfigFields(sparse), layer, num_layers)
    size = fields.first("index_head_dim", default=0)
    if not size:
        return None
    most_seen = fields.first("index_topk", default=0)
    types = fields.per_layer("indexer_types", num_layers)
    if types and types[layer] != "full":
        return Indexer(most_seen=most_seen)
    hidden, heads = fields.first("hidden_size"), fields.first("index_n_heads")
    queries = fields.first("q_lora_rank", default=hidden, low=1) * heads * size
    pool = fields.first("index_kpool", default=1, low=1)
    # Until a pool is full, a key and a gate of each of its tokens wait in bf16.
    return Indexer(
        most_seen=most_seen,
        key_bytes=index_bytes(size),
        dim=heads * size,
        tokens_per_key=pool,
        waiting_bytes=2 * BF16_BYTES * size if pool > 1 else 0,
        params=queries + hidden * (size + heads),
    )


def _of_blocks(
    fields: ConfigFields, sparse: ConfigFields, layer: int, num_layers: int
) -> Indexer | None:
    listed = sparse.per_layer("sparse_attention_freq", num_layers)
    if not listed or not listed[layer]:
        return None
    size, heads = sparse.first("sparse_index_dim"), sparse.first("sparse_num_index_heads")
    return Indexer(
        most_seen=sparse.first("sparse_topk_blocks") * sparse.first("sparse_block_size"),
        key_bytes=BF16_BYTES * size,
        dim=heads * size,
        bits=8 * BF16_BYTES,
        params=fields.first("hidden_size") * (heads + 1) * size,
    )

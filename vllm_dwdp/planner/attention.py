"""The parameters and the core of a layer of attention, as config.json describes it. Pure."""

from vllm_dwdp.planner import compressed
from vllm_dwdp.planner.checkpoint import ConfigFields
from vllm_dwdp.planner.kv_cache import KV_HEADS


def attention_of(fields: ConfigFields, hidden: int, num_layers: int) -> tuple[int, int]:
    """Return the parameters and the core size of a layer of attention."""
    if compressed.is_compressed(fields):
        return compressed.attention(fields, num_layers)
    is_latent = fields.config.get("kv_lora_rank") is not None
    return _mla(fields, hidden) if is_latent else _gqa(fields, hidden)


def _mla(fields: ConfigFields, hidden: int) -> tuple[int, int]:
    """Multi-head latent attention: parameters and core size.

    Keys and values are made of the latent before they are attended to, where an indexer chooses them of
    the latent itself (vLLM's sparse back ends).
    """
    heads = fields.first("num_attention_heads")
    nope, rope = fields.first("qk_nope_head_dim"), fields.first("qk_rope_head_dim", low=0)
    value, latent = fields.first("v_head_dim"), fields.first("kv_lora_rank")
    query_rank = fields.first("q_lora_rank", default=0)
    query = (
        hidden * query_rank + query_rank * heads * (nope + rope)
        if query_rank
        else hidden * heads * (nope + rope)
    )
    key_value = hidden * (latent + rope) + latent * heads * (nope + value)
    is_sparse = fields.config.get("index_head_dim") is not None
    key, seen = (latent, latent) if is_sparse else (nope, value)
    return query + key_value + heads * value * hidden, heads * (key + rope + seen)


def _gqa(fields: ConfigFields, hidden: int) -> tuple[int, int]:
    """Grouped-query attention: parameters and core size."""
    heads = fields.first("num_attention_heads")
    groups = fields.first(*KV_HEADS, default=heads)
    size = fields.first("head_dim", default=max(1, hidden // heads), low=1)
    parameters = 2 * hidden * heads * size + 2 * hidden * groups * size
    return parameters, 2 * heads * size

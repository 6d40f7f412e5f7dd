"""DeepSeek-V4: layers that keep a window, and of all tokens before it one entry for several. Pure.

A layer compresses 4 or 128 tokens into one entry, or keeps the window only; `compress_ratios` has its
number. Of the entries for 4 tokens an indexer chooses those that a query sees. What is not compressed
yet waits in a state, whose tokens lie in a window of their own. The sizes are those of vLLM's
`DeepseekV4Attention` and of the caches beside it.
"""

from collections.abc import Iterator
from math import ceil

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.cache_parts import CachePart, index_bytes, packed
from vllm_dwdp.planner.checked import shown, whole
from vllm_dwdp.planner.checkpoint import ConfigFields

MODEL_TYPE = "deepseek_v4"
WINDOW_ONLY, CHOSEN, WHOLE = 1, 4, 128
"""Tokens of an entry: where there are none, where an indexer chooses, and where a query sees all."""
STATE_ELEMENT_BYTES = 4
SCALE_GROUP, SCALE_ALIGNMENT = 64, 8
"""In 8 bits, elements that share a scale of one byte, and the bytes that scales fill whole."""
KV_BITS = 8
"""What vLLM keeps them in, where nothing is asked for."""


def is_compressed(fields: ConfigFields) -> bool:
    """Whether layers compress what they keep."""
    return fields.config.get("compress_ratios") is not None


def experts(fields: ConfigFields) -> str:
    """Return the format of experts that the config names beside `quantization_config`; "" if none."""
    default = "fp4" if is_compressed(fields) else ""
    return str(fields.config.get("expert_dtype") or default)


def cache_parts(
    fields: ConfigFields, num_layers: int, kv_bits: float, num_gpus: int
) -> Iterator[CachePart]:
    """List what all layers keep, on all GPUs of a rank: each has all of it."""
    size, rotary = fields.first("head_dim"), fields.first("qk_rope_head_dim", low=0)
    scales = ceil(ceil((size - rotary) / SCALE_GROUP) / SCALE_ALIGNMENT) * SCALE_ALIGNMENT
    elements = num_gpus * packed(size - rotary, rotary, scales, kv_bits)
    for ratio in _ratios(fields, num_layers):
        yield CachePart(elements=elements, window=fields.first("sliding_window"))
        if ratio == WINDOW_ONLY:
            continue
        is_chosen = ratio == CHOSEN
        index_size = fields.first("index_head_dim") if is_chosen else 0
        yield CachePart(
            elements=elements,
            own_bytes=num_gpus * index_bytes(index_size),
            tokens_per_entry=ratio,
            most_seen=fields.first("index_topk") if is_chosen else 0,
            index_dim=num_gpus * fields.first("index_n_heads") * index_size if is_chosen else 0,
        )
        overlap = _overlap(ratio)
        for each in filter(None, (size, index_size)):
            state = 2 * overlap * each * STATE_ELEMENT_BYTES  # a sum and a weight
            yield CachePart(own_bytes=num_gpus * state, window=overlap * ratio)


def attention(fields: ConfigFields, num_layers: int) -> tuple[int, int]:
    """Return the linear weights of a layer's attention, in the mean, and its core size."""
    found = _ratios(fields, num_layers)
    hidden, heads = fields.first("hidden_size"), fields.first("num_attention_heads")
    size, rank = fields.first("head_dim"), fields.first("q_lora_rank")
    groups, out = fields.first("o_groups"), fields.first("o_lora_rank")
    whole = (
        hidden * (rank + size) + rank * heads * size + heads * size * out + groups * out * hidden
    )
    beside = sum(_beside(fields, ratio) for ratio in found)
    return whole + round(beside / num_layers), 2 * heads * size


def _beside(fields: ConfigFields, ratio: int) -> int:
    """Count the weights of a layer's compressors and of its indexer."""
    if ratio == WINDOW_ONLY:
        return 0
    hidden, rows = fields.first("hidden_size"), 2 * _overlap(ratio)
    compressor = hidden * rows * fields.first("head_dim")
    if ratio != CHOSEN:
        return compressor
    size, heads = fields.first("index_head_dim"), fields.first("index_n_heads")
    queries = fields.first("q_lora_rank") * heads * size + hidden * heads
    return compressor + hidden * rows * size + queries


def _ratios(fields: ConfigFields, num_layers: int) -> list[int]:
    """Return by layer how many tokens an entry stands for.

    Raises:
        DwdpConfigError: vLLM's DeepSeek-V4 has no such layers.
    """
    name = fields.named("compress_ratios")
    listed = fields.per_layer("compress_ratios", num_layers)
    found = [max(WINDOW_ONLY, whole(f"{name}: an entry", each, 0)) for each in listed]
    known = {WINDOW_ONLY, CHOSEN, WHOLE} if fields.model_type == MODEL_TYPE else set[int]()
    if not found or not known.issuperset(found):
        raise DwdpConfigError(
            f"{name} is {shown(listed)}; what layers keep that compress their KV cache is known here "
            f"for {MODEL_TYPE} with entries of {CHOSEN} and {WHOLE} tokens. vLLM logs the size of its "
            "KV cache at start: plan with that."
        )
    return found


def _overlap(ratio: int) -> int:
    """Return to how many entries a token adds."""
    return 2 if ratio == CHOSEN else 1

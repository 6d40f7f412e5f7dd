"""Which layers of a model have routed experts, and which see only a window of the keys. Pure."""

from collections import Counter
from collections.abc import Sequence

from vllm_dwdp.planner.checked import whole
from vllm_dwdp.planner.config_fields import ConfigFields

NUM_SLOTS = 2
FULL_EVERY = 4
"""Of Llama-4's layers one in so many sees all keys, where config.json does not say which."""


def moe_layers(fields: ConfigFields, num_layers: int) -> tuple[int, ...]:
    """The layers with routed experts.

    Follows the families: `moe_layers` or `interleave_moe_layer_step` (Llama-4), `decoder_sparse_step`
    and `mlp_only_layers` (Qwen), `first_k_dense_replace` and `moe_layer_freq` (DeepSeek, GLM; a
    frequency, or a list of 0 and 1).
    """
    if listed := fields.layers("moe_layers", num_layers):
        return listed
    dense_first = fields.first("first_k_dense_replace", default=0)
    every = fields.first("decoder_sparse_step", "interleave_moe_layer_step", default=1, low=1)
    dense = set(fields.layers("mlp_only_layers", num_layers))
    has_experts = _by_frequency(fields, num_layers)
    return tuple(
        layer
        for layer in range(num_layers)
        if layer >= dense_first
        and (layer + 1) % every == 0
        and has_experts[layer]
        and layer not in dense
    )


def _by_frequency(fields: ConfigFields, num_layers: int) -> list[bool]:
    name = "moe_layer_freq"
    if isinstance(fields.config.get(name), list):
        listed = fields.per_layer(name, num_layers)
        return [bool(whole(f"{fields.named(name)}: an entry", one, 0, 1)) for one in listed]
    frequency = fields.first(name, default=1, low=1)
    return [layer % frequency == 0 for layer in range(num_layers)]


def dense_beside(layers: Sequence[int], num_layers: int) -> tuple[tuple[float, int], ...]:
    """How many dense layers hide a copy beside an MoE layer: pairs of that, and of MoE layers.

    While dense layers run, the copies go on into the slots that are free: those of the next
    `NUM_SLOTS` MoE layers, and no others (`prefetch.schedule`). So the dense layers before a run of MoE
    layers help its first two, and those after the last one help the next step.

    Args:
        layers: with experts, ascending, at least one.
    """
    runs: list[list[int]] = []
    previous = layers[-1] - num_layers
    for layer in layers:
        dense = layer - previous - 1
        if dense or not runs:
            runs.append([dense, 0])
        runs[-1][1] += 1
        previous = layer
    found: Counter[float] = Counter()
    for dense, count in runs:
        helped = min(count, NUM_SLOTS) if dense else 0
        if helped:
            found[dense / helped] += helped
        if count > helped:
            found[0.0] += count - helped
    return tuple(sorted(found.items()))


def narrow_layers(fields: ConfigFields, num_layers: int) -> tuple[float, int, bool]:
    """The part of the layers that see a window or a chunk, its tokens, and whether it is a chunk."""
    types = fields.per_layer("layer_types", num_layers)
    chunk = fields.first("attention_chunk_size", default=0)
    window = fields.first("sliding_window", default=0)
    if types:
        narrow = sum(kind in ("sliding_attention", "chunked_attention") for kind in types)
        is_chunk = bool(chunk) and "chunked_attention" in types
    elif chunk:
        narrow, is_chunk = sum(_rotary_layers(fields, num_layers)), True
    else:
        narrow, is_chunk = 0, False
    size = chunk if is_chunk else window or chunk
    return (narrow / num_layers, size, is_chunk) if size and narrow else (0.0, 0, False)


def _rotary_layers(fields: ConfigFields, num_layers: int) -> list[bool]:
    """Llama-4's layers with a rotary embedding: these see a chunk. The list says 1 for them."""
    name = "no_rope_layers"
    if listed := fields.per_layer(name, num_layers):
        return [bool(whole(f"{fields.named(name)}: an entry", one, 0, 1)) for one in listed]
    every = fields.first("no_rope_layer_interval", default=FULL_EVERY, low=1)
    return [(layer + 1) % every != 0 for layer in range(num_layers)]

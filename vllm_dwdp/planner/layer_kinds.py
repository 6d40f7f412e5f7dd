"""What each layer keeps of a sequence, whatever its family calls it. Pure."""

from enum import Enum

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import shown, whole
from vllm_dwdp.planner.checkpoint import ConfigFields

FULL_EVERY = 4
"""One of so many layers of Llama-4 and Qwen3-Next sees all keys, where nothing says which."""


class LayerKind(Enum):
    """What a layer keeps of a sequence."""

    FULL = "keys and values of every token"
    WINDOW = "those of the last tokens"
    CHUNK = "those of a chunk"
    STATE = "a state"
    NONE = "nothing"


NAMED_KINDS = {
    LayerKind.FULL: ("full_attention", "attention", "indexed_attention", "hybrid", "*"),
    LayerKind.WINDOW: ("sliding_attention", "hybrid_sliding"),
    LayerKind.CHUNK: ("chunked_attention",),
    LayerKind.STATE: ("linear_attention", "mamba", "conv", "M"),
    LayerKind.NONE: ("moe", "mlp", "E", "-"),
}
"""What configs call them, by layer or as letters (NemotronH)."""


def layer_kinds(fields: ConfigFields, num_layers: int) -> list[LayerKind]:
    """Say what every layer keeps, as the families say it.

    A list of names (`layer_types`, NemotronH's `layers_block_type` or `hybrid_override_pattern`), of 0
    and 1 (MiMo's `hybrid_layer_pattern`), of layer numbers (Kimi's `linear_attn_config`, Inkling's
    `local_layer_ids`), or a period (Qwen3-Next's `full_attention_interval`, Ling's `layer_group_size`,
    Jamba's `attn_layer_period`, Llama-4's rotary layers).

    Raises:
        DwdpConfigError: a kind is unknown, or a list does not fit the layers.
    """
    for name in ("layers_block_type", "layer_types"):
        if named := fields.per_layer(name, num_layers):
            return [_named_kind(fields, name, each) for each in named]
    if letters := fields.config.get("hybrid_override_pattern"):
        return [_named_kind(fields, "hybrid_override_pattern", each) for each in str(letters)]
    if listed := fields.per_layer("hybrid_layer_pattern", num_layers):
        return [LayerKind.WINDOW if each == 1 else LayerKind.FULL for each in listed]
    if local := fields.layers("local_layer_ids", num_layers):
        layers = range(num_layers)
        return [LayerKind.WINDOW if layer in local else LayerKind.FULL for layer in layers]
    return _periodic_kinds(fields, num_layers)


def _named_kind(fields: ConfigFields, field: str, name: object) -> LayerKind:
    for kind, names in NAMED_KINDS.items():
        if name in names:
            return kind
    raise DwdpConfigError(
        f"{fields.named(field)} has {shown(name)}, a kind of layer whose KV cache is unknown here. vLLM "
        "logs the size of its KV cache at start: plan with that."
    )


def _periodic_kinds(fields: ConfigFields, num_layers: int) -> list[LayerKind]:
    layers = range(num_layers)
    inner = fields.config.get("linear_attn_config")
    if isinstance(inner, dict):
        full = {layer - 1 for layer in inner.get("full_attn_layers") or ()}  # counted from 1
        return [LayerKind.FULL if layer in full else LayerKind.STATE for layer in layers]
    if fields.config.get("linear_num_key_heads") is not None:
        every = fields.first("full_attention_interval", default=FULL_EVERY, low=1)
        return [LayerKind.STATE if (layer + 1) % every else LayerKind.FULL for layer in layers]
    if group := fields.first("layer_group_size", default=0):
        whole_groups = num_layers // group * group if _ends_in_full(fields) else num_layers
        return [
            LayerKind.STATE if (layer + 1) % group and layer < whole_groups else LayerKind.FULL
            for layer in layers
        ]
    if fields.config.get("attn_layer_period") is not None:
        period, offset = fields.first("attn_layer_period"), fields.first("attn_layer_offset", low=0)
        return [LayerKind.FULL if layer % period == offset else LayerKind.STATE for layer in layers]
    if fields.first("attention_chunk_size", default=0):
        rotary = _rotary_layers(fields, num_layers)
        return [LayerKind.CHUNK if each else LayerKind.FULL for each in rotary]
    return [LayerKind.FULL] * num_layers


def _ends_in_full(fields: ConfigFields) -> bool:
    """Whether the layers after the last whole group of Ling's are full: in its third version."""
    return fields.config.get("short_conv_kernel_size") is not None


def narrow_size(fields: ConfigFields, kind: LayerKind) -> int:
    """Return the tokens that a layer keeps at most; 0 for all."""
    if kind is LayerKind.CHUNK:
        return fields.first("attention_chunk_size", "sliding_window", default=0)
    if kind is LayerKind.WINDOW:
        names = ("sliding_window", "sliding_window_size", "attention_chunk_size")
        return fields.first(*names, default=0)
    return 0


def _rotary_layers(fields: ConfigFields, num_layers: int) -> list[bool]:
    """Say which Llama-4 layers have a rotary embedding: these see a chunk. The list says 1 for them."""
    name = "no_rope_layers"
    if listed := fields.per_layer(name, num_layers):
        return [bool(whole(f"{fields.named(name)}: an entry", one, 0, 1)) for one in listed]
    every = fields.first("no_rope_layer_interval", default=FULL_EVERY, low=1)
    return [(layer + 1) % every != 0 for layer in range(num_layers)]

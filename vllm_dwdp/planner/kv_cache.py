"""What each layer keeps of a sequence: keys and values, a latent, a window of them, or a state. Pure.

vLLM keeps one of these per layer (its `KVCacheSpec`): `FullAttentionSpec` and `MLAAttentionSpec` grow
with the sequence, `SlidingWindowSpec` and `ChunkedLocalAttentionSpec` do so up to a size, `MambaSpec` is
the same for every sequence. Layers that read the cache of an earlier one, and layers without attention,
keep nothing.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checkpoint import ConfigFields
from vllm_dwdp.planner.layer_kinds import LayerKind, layer_kinds, narrow_size
from vllm_dwdp.planner.states import NO_STATE, LayerState, layer_state

INDEX_GROUP, INDEX_SCALE_BYTES = 128, 4
"""An indexer keeps a key in FP8, and a scale for each so many of its elements."""
BF16_BYTES = 2
KV_HEADS = ("num_key_value_heads", "num_attention_groups")
KV_FIELDS = {
    LayerKind.FULL: (("num_global_key_value_heads",), ("global_head_dim",), ()),
    LayerKind.WINDOW: (("swa_num_key_value_heads",), ("swa_head_dim",), ("swa_v_head_dim",)),
}
"""Heads, and the sizes of keys and values, where layers of a kind have their own (Gemma 4, MiMo)."""
ENCODERS = ("openai_privacy_filter",)
"""Types of models whose layers see a whole sequence at once, and keep nothing of it."""


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """What one layer keeps of a sequence; nothing, if nothing is given.

    Args:
        elements: of keys and values, or of their latent, per token.
        index_bytes: per token, of a sparse indexer's keys; their type is their own.
        ring_bytes: per sequence, of its last tokens, whose keys the indexer has not pooled yet.
        window: the most tokens kept; 0 for all.
        is_chunk: the window is a chunk, of which a token sees half in the mean.
        state: of a sequence of any length.
    """

    elements: int = 0
    index_bytes: float = 0
    ring_bytes: int = 0
    window: int = 0
    is_chunk: bool = False
    state: LayerState = NO_STATE

    @property
    def fixed_bytes(self) -> float:
        """The bytes of a sequence of any length."""
        return self.state.num_bytes + self.ring_bytes

    def token_bytes(self, kv_bits: float) -> float:
        """Return the bytes of a token that is kept."""
        return self.elements * kv_bits / 8 + self.index_bytes

    def keys_seen(self, mean_keys: float) -> float:
        """Return the keys that a query meets, where those of all tokens would be `mean_keys`."""
        if not self.elements:
            return 0.0
        narrow = self.window / 2 if self.is_chunk else self.window
        return min(mean_keys, narrow) if self.window else mean_keys


@dataclass(frozen=True)
class KvCache:
    """What all layers keep.

    Args:
        layers: of the model, in order.
        kv_bits: of an element of keys and values.
    """

    layers: tuple[LayerCache, ...]
    kv_bits: float

    @cached_property
    def token_bytes(self) -> float:
        """The bytes per token of the layers that keep every token."""
        return sum(layer.token_bytes(self.kv_bits) for layer in self.layers if not layer.window)

    @cached_property
    def window_bytes(self) -> float:
        """The bytes per sequence, at most, of the layers that keep a window or a chunk."""
        return sum(layer.window * layer.token_bytes(self.kv_bits) for layer in self.layers)

    @cached_property
    def window_tokens(self) -> int:
        """The tokens of the largest window; 0 if there is none."""
        return max(layer.window for layer in self.layers)

    @cached_property
    def state_bytes(self) -> float:
        """The bytes per sequence, of any length, of the layers that keep a state or a ring."""
        return sum(layer.fixed_bytes for layer in self.layers)

    @cached_property
    def num_full(self) -> int:
        """The number of layers that keep every token."""
        return sum(bool(layer.elements) and not layer.window for layer in self.layers)

    @cached_property
    def num_states(self) -> int:
        """The number of layers that keep a state or a ring."""
        return sum(layer.fixed_bytes > 0 for layer in self.layers)

    def sequence_bytes(self, tokens: float) -> float:
        """Return the bytes of a sequence of so many tokens."""
        windows = sum(
            min(tokens, layer.window) * layer.token_bytes(self.kv_bits) for layer in self.layers
        )
        return tokens * self.token_bytes + windows + self.state_bytes

    def keys_seen(self, mean_keys: float) -> float:
        """Return the keys that a query meets in a layer, in the mean over the layers."""
        return sum(layer.keys_seen(mean_keys) for layer in self.layers) / len(self.layers)

    def read_bytes(self, mean_keys: float) -> float:
        """Return what a query reads in a layer, in the mean; a state is written back too."""
        keys = sum(
            layer.keys_seen(mean_keys) * layer.token_bytes(self.kv_bits) for layer in self.layers
        )
        return (keys + 2 * self.state_bytes) / len(self.layers)


def kv_cache(
    fields: ConfigFields, num_layers: int, kv_bits: float, tensor_parallel_size: int = 1
) -> KvCache:
    """Read what every layer keeps.

    Args:
        kv_bits: of an element of keys and values.
        tensor_parallel_size: GPUs of a rank, together. They divide the heads of keys and values, and
            repeat them where they are fewer; each keeps all of a latent.

    Raises:
        DwdpConfigError: what a layer keeps is unknown here.
    """
    if fields.config.get("compress_ratios") is not None:
        raise DwdpConfigError(
            f"{fields.named('compress_ratios')} says that layers compress their KV cache; what they "
            "keep is unknown here. vLLM logs the size of its KV cache at start: plan with that."
        )
    if fields.model_type in ENCODERS:
        return KvCache((LayerCache(),) * num_layers, kv_bits)
    own_until = num_layers - fields.first("num_kv_shared_layers", default=0)
    kinds = layer_kinds(fields, num_layers)[:own_until]
    layers = [
        _layer_cache(fields, kind, layer, num_layers, tensor_parallel_size)
        for layer, kind in enumerate(kinds)
    ]
    shared = [LayerCache()] * (num_layers - len(layers))
    return KvCache((*layers, *shared), kv_bits)


def _layer_cache(
    fields: ConfigFields, kind: LayerKind, layer: int, num_layers: int, num_gpus: int
) -> LayerCache:
    if kind is LayerKind.NONE:
        return LayerCache()
    if kind is LayerKind.STATE:
        return LayerCache(state=layer_state(fields))
    window = narrow_size(fields, kind)
    index_bytes = num_gpus * _index_bytes(fields, layer, num_layers)
    pool = fields.first("index_kpool", default=1, low=1)
    return LayerCache(
        elements=_elements(fields, kind, layer, num_layers, num_gpus),
        index_bytes=index_bytes / pool,
        ring_bytes=num_gpus * _ring_bytes(fields, pool) if index_bytes else 0,
        window=window,
        is_chunk=kind is LayerKind.CHUNK and bool(window),
    )


def _elements(
    fields: ConfigFields, kind: LayerKind, layer: int, num_layers: int, num_gpus: int
) -> int:
    """Count what a layer of attention keeps of a token, on all GPUs of a rank."""
    if fields.config.get("kv_lora_rank") is not None:
        latent = fields.first("kv_lora_rank") + fields.first("qk_rope_head_dim", low=0)
        return num_gpus * latent * fields.attentions_per_layer
    own = _own_fields(fields, layer, num_layers)
    heads_names, size_names, value_names = KV_FIELDS.get(kind, ((), (), ()))
    num_heads = fields.first("num_attention_heads")
    heads = max(num_gpus, own.first(*heads_names, *KV_HEADS, default=num_heads, low=1))
    derived = max(1, fields.first("hidden_size") // num_heads)
    size = own.first(*size_names, "head_dim", default=derived, low=1)
    return heads * (size + own.first(*value_names, "v_head_dim", default=size, low=1))


def _own_fields(fields: ConfigFields, layer: int, num_layers: int) -> ConfigFields:
    """Let a layer's own fields win: those of its kind (Step), or of its number (Gemma 4).

    `per_layer_config` has padded numbers as keys.
    """
    others: Any = fields.config.get("attention_other_setting")
    if isinstance(others, dict):
        types = fields.per_layer("layer_types", num_layers)
        is_other = bool(types) and types[layer] == others.get("attention_type")
        return ConfigFields(fields.config | others) if is_other else fields
    listed: Any = fields.config.get("per_layer_config")
    if not isinstance(listed, dict):
        return fields
    width = len(str(num_layers - 1))
    own = listed.get(f"{layer:0{width}}") or listed.get(str(layer)) or {}
    return ConfigFields(fields.config | own) if isinstance(own, dict) else fields


def _index_bytes(fields: ConfigFields, layer: int, num_layers: int) -> int:
    """Count what a sparse indexer keeps of a token (DeepSeek-V3.2); layers may share one (GLM-5).

    MiniMax-M3's keys are in bf16, in the layers that its config lists.
    """
    sparse = fields.config.get("sparse_attention_config")
    if isinstance(sparse, dict):
        inner = ConfigFields(sparse)
        listed = inner.per_layer("sparse_attention_freq", num_layers)
        return BF16_BYTES * inner.first("sparse_index_dim") if listed and listed[layer] else 0
    size = fields.first("index_head_dim", default=0)
    types = fields.per_layer("indexer_types", num_layers)
    if not size or (types and types[layer] != "full"):
        return 0
    return size + size // INDEX_GROUP * INDEX_SCALE_BYTES


def _ring_bytes(fields: ConfigFields, pool: int) -> int:
    """Count what an indexer keeps of tokens until so many are one key (GLM-5.3-Flash).

    A key and a gate of each are in bf16.
    """
    return 2 * BF16_BYTES * fields.first("index_head_dim") * pool if pool > 1 else 0

"""What each layer keeps of a sequence: keys and values, a latent, a window of them, or a state. Pure.

vLLM keeps one of these per layer (its `KVCacheSpec`): `FullAttentionSpec` and `MLAAttentionSpec` grow
with the sequence, `SlidingWindowSpec` and `ChunkedLocalAttentionSpec` do so up to a size, `MambaSpec` is
the same for every sequence. Layers that read the cache of an earlier one, and layers without attention,
keep nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from vllm_dwdp.planner import compressed
from vllm_dwdp.planner.cache_parts import (
    INDEX_GROUP,
    INDEX_SCALE_BYTES,
    CachePart,
    Scoring,
    packed,
)
from vllm_dwdp.planner.checkpoint import ConfigFields
from vllm_dwdp.planner.indexers import Indexer, indexer_of
from vllm_dwdp.planner.layer_kinds import LayerKind, layer_kinds, narrow_size
from vllm_dwdp.planner.states import layer_state

KV_HEADS = ("num_key_value_heads", "num_attention_groups")
KV_FIELDS = {
    LayerKind.FULL: (("num_global_key_value_heads",), ("global_head_dim",), ()),
    LayerKind.WINDOW: (("swa_num_key_value_heads",), ("swa_head_dim",), ("swa_v_head_dim",)),
}
"""Heads, and the sizes of keys and values, where layers of a kind have their own (Gemma 4, MiMo)."""
ENCODERS = ("openai_privacy_filter",)
"""Types of models whose layers see a whole sequence at once, and keep nothing of it."""


@dataclass(frozen=True)
class KvCache:
    """What all layers keep.

    Args:
        parts: of all layers.
        num_layers: of the model.
        kv_bits: of an element of keys and values.
    """

    parts: tuple[CachePart, ...]
    num_layers: int
    kv_bits: float

    @cached_property
    def token_bytes(self) -> float:
        """The bytes per token of the layers that keep every token."""
        return sum(part.token_bytes(self.kv_bits) for part in self.parts if not part.window)

    @cached_property
    def window_bytes(self) -> float:
        """The bytes per sequence, at most, of the layers that keep a window or a chunk."""
        return sum(part.window * part.token_bytes(self.kv_bits) for part in self.parts)

    @cached_property
    def window_tokens(self) -> int:
        """The tokens of the largest window; 0 if there is none."""
        return max((part.window for part in self.parts), default=0)

    @cached_property
    def state_bytes(self) -> float:
        """The bytes per sequence, of any length, of the layers that keep a state."""
        return sum(part.state.num_bytes for part in self.parts)

    @cached_property
    def num_full(self) -> int:
        """The number of layers that keep every token."""
        return sum(bool(part.elements) and not part.window for part in self.parts)

    @cached_property
    def num_states(self) -> int:
        """The number of layers that keep a state."""
        return sum(part.state.num_bytes > 0 for part in self.parts)

    def sequence_bytes(self, tokens: float) -> float:
        """Return the bytes of a sequence of so many tokens."""
        windows = sum(
            min(tokens, part.window) * part.token_bytes(self.kv_bits) for part in self.parts
        )
        return tokens * self.token_bytes + windows + self.state_bytes

    def keys_seen(self, mean_keys: float) -> float:
        """Return the keys that a query attends to in a layer, in the mean over the layers."""
        return sum(part.keys_seen(mean_keys) for part in self.parts) / self.num_layers

    def read_bytes(self, mean_keys: float) -> float:
        """Return what attention reads for a query in a layer, in the mean; a state is written too."""
        keys = sum(part.read_bytes(mean_keys, self.kv_bits) for part in self.parts)
        return (keys + 2 * self.state_bytes) / self.num_layers

    def scoring(self, mean_keys: float) -> dict[int, Scoring]:
        """Return what indexers do for a query in a layer, in the mean, by the bits of their products."""
        by_bits: dict[int, list[Scoring]] = {}
        for part in self.parts:
            if part.index_dim:
                by_bits.setdefault(part.index_bits, []).append(part.scoring(mean_keys))
        return {
            bits: Scoring(*(sum(column) / self.num_layers for column in zip(*found, strict=True)))
            for bits, found in by_bits.items()
        }


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
    if fields.model_type in ENCODERS:
        return KvCache((), num_layers, kv_bits)
    if compressed.is_compressed(fields):
        parts = compressed.cache_parts(fields, num_layers, kv_bits, tensor_parallel_size)
        return KvCache(tuple(parts), num_layers, kv_bits)
    own_until = num_layers - fields.first("num_kv_shared_layers", default=0)
    kinds = layer_kinds(fields, num_layers)[:own_until]
    found = chain.from_iterable(
        _layer_parts(fields, kind, layer, num_layers, kv_bits, tensor_parallel_size)
        for layer, kind in enumerate(kinds)
    )
    return KvCache(tuple(found), num_layers, kv_bits)


def _layer_parts(
    fields: ConfigFields,
    kind: LayerKind,
    layer: int,
    num_layers: int,
    kv_bits: float,
    num_gpus: int,
) -> Iterator[CachePart]:
    if kind is LayerKind.NONE:
        return
    if kind is LayerKind.STATE:
        yield CachePart(state=layer_state(fields))
        return
    indexer = indexer_of(fields, layer, num_layers)
    most_seen = indexer.most_seen if indexer else 0
    if fields.config.get("kv_lora_rank") is not None:
        elements, window = _latent(fields, kv_bits, num_gpus, is_sparse=indexer is not None), 0
    else:
        elements = _elements(fields, kind, layer, num_layers, num_gpus)
        window = narrow_size(fields, kind)
    yield CachePart(
        elements=elements,
        window=window,
        is_chunk=kind is LayerKind.CHUNK and bool(window),
        most_seen=most_seen,
    )
    if indexer and indexer.key_bytes:
        yield from _index(indexer, num_gpus)


def _latent(fields: ConfigFields, kv_bits: float, num_gpus: int, *, is_sparse: bool) -> int:
    """Count what a layer of latent attention keeps of a token; each GPU of a rank has all of it."""
    size, rotary = fields.first("kv_lora_rank"), fields.first("qk_rope_head_dim", low=0)
    scales = size // INDEX_GROUP * INDEX_SCALE_BYTES
    elements = packed(size, rotary, scales, kv_bits) if is_sparse else size + rotary
    return num_gpus * elements * fields.attentions_per_layer


def _index(indexer: Indexer, num_gpus: int) -> Iterator[CachePart]:
    """Yield the keys of an indexer, which each GPU of a rank has, and the tokens of an open pool."""
    yield CachePart(
        own_bytes=num_gpus * indexer.key_bytes,
        tokens_per_entry=indexer.tokens_per_key,
        index_dim=num_gpus * indexer.dim,
        index_bits=indexer.bits,
    )
    if indexer.waiting_bytes:
        yield CachePart(own_bytes=num_gpus * indexer.waiting_bytes, window=indexer.tokens_per_key)


def _elements(
    fields: ConfigFields, kind: LayerKind, layer: int, num_layers: int, num_gpus: int
) -> int:
    """Count what a layer keeps of a token's keys and values, on all GPUs of a rank."""
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

"""The sizes of an MoE model that matter for its speed, from a Hugging Face config.json."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import shown
from vllm_dwdp.planner.checkpoint import ConfigFields, moe_layers, narrow_layers
from vllm_dwdp.planner.quantisation import FORMATS, UNQUANTISED, Precision, Quantisation
from vllm_dwdp.prefetch.schedule import NUM_SLOTS

_UNQUANTISED = Precision.of(UNQUANTISED)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Parameters and operations per layer.

    Args:
        name: architecture.
        num_layers: all of them.
        moe_layers: those with routed experts, ascending.
        num_experts, experts_per_token: of an MoE layer.
        expert_params: of one routed expert.
        shared_params: of the shared experts of a layer.
        dense_mlp_params: of the feed-forward of a layer without experts.
        attention_params: linear weights of one layer's attention.
        core_dim: sum over query heads of key and value head sizes: a query and a key cost
            `2 * core_dim` operations.
        kv_elements: of the KV cache, per token and layer.
        embedding_params: embeddings and head, in 16 bits.
        hidden_size: of the residual stream.
        expert_precision, shared_precision, dense_mlp_precision, attention_precision: of the weights.
        kv_bits: of an element of the KV cache.
        sliding_share, sliding_window: part of the layers whose tokens see at most so many keys.
        sliding_is_chunk: these see what their chunk holds so far, half of it in the mean.
    """

    name: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    experts_per_token: int
    expert_params: int
    shared_params: int
    dense_mlp_params: int
    attention_params: int
    core_dim: int
    kv_elements: int
    embedding_params: int
    hidden_size: int
    expert_precision: Precision
    shared_precision: Precision = _UNQUANTISED
    dense_mlp_precision: Precision = _UNQUANTISED
    attention_precision: Precision = _UNQUANTISED
    kv_bits: float = UNQUANTISED.bits
    sliding_share: float = 0.0
    sliding_window: int = 0
    sliding_is_chunk: bool = False

    @property
    def num_moe_layers(self) -> int:
        """The number of layers with routed experts."""
        return len(self.moe_layers)

    @cached_property
    def dense_beside(self) -> tuple[tuple[float, int], ...]:
        """Dense layers that hide a copy beside an MoE layer, and how many MoE layers have so many."""
        return dense_beside(self.moe_layers, self.num_layers)

    @cached_property
    def expert_bits(self) -> float:
        """The bits of a weight of a routed expert, in the mean over the layers."""
        return self.expert_precision.bits

    @cached_property
    def shared_bits(self) -> float:
        """The mean bits of a weight of the shared experts."""
        return self.shared_precision.bits

    @cached_property
    def dense_mlp_bits(self) -> float:
        """The mean bits of a weight of feed-forwards without experts."""
        return self.dense_mlp_precision.bits

    @cached_property
    def attention_bits(self) -> float:
        """The mean bits of a linear weight of attention."""
        return self.attention_precision.bits

    @property
    def expert_bytes(self) -> float:
        """The bytes of one routed expert."""
        return self.expert_params * self.expert_bits / 8

    @property
    def experts_bytes(self) -> float:
        """The bytes of all routed experts of all layers."""
        return self.num_moe_layers * self.num_experts * self.expert_bytes

    @property
    def dense_bytes(self) -> float:
        """The bytes of everything that every rank holds."""
        bits = (
            self.num_moe_layers * self.shared_params * self.shared_bits
            + (self.num_layers - self.num_moe_layers) * self.dense_mlp_params * self.dense_mlp_bits
            + self.num_layers * self.attention_params * self.attention_bits
            + self.embedding_params * 16
        )
        return bits / 8

    def keys_seen(self, mean_keys: float) -> float:
        """Return the keys that a query meets in a layer, in the mean over the layers."""
        narrow = self.sliding_window / 2 if self.sliding_is_chunk else self.sliding_window
        return mean_keys * (1 - self.sliding_share) + min(mean_keys, narrow) * self.sliding_share

    def kv_bytes_per_token(self, context_tokens: float) -> float:
        """Return the bytes of the KV cache, all layers, per token of a sequence of `context_tokens`."""
        seen = min(1.0, self.sliding_window / max(1.0, context_tokens))
        layers = self.num_layers * (1.0 - self.sliding_share + self.sliding_share * seen)
        return layers * self.kv_elements * self.kv_bits / 8


def dense_beside(layers: Sequence[int], num_layers: int) -> tuple[tuple[float, int], ...]:
    """Count the dense layers that hide a copy beside an MoE layer: pairs of that and of MoE layers.

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


def shape_of(
    config: dict[str, Any],
    expert_dtype: str | None = None,
    kv_dtype: str | None = None,
    dense_dtype: str | None = None,
) -> ModelShape:
    """Read the shape of DeepSeek-V2/V3, Qwen2/3-MoE, gpt-oss, Mixtral, GLM-4-MoE, Llama-4 and the like.

    Args:
        config: of the text model.
        expert_dtype, kv_dtype, dense_dtype: override what `quantization_config` says of the routed
            experts, of the KV cache, and of all other linear weights; keys of `FORMATS`.

    Raises:
        DwdpConfigError: the config describes no routed experts, or a field is missing or wrong.
    """
    fields = ConfigFields(config)
    num_experts, experts_per_token = _routing(fields)
    hidden = fields.first("hidden_size")
    num_layers = fields.first("num_hidden_layers")
    with_experts = moe_layers(fields, num_layers)
    if not with_experts:
        raise DwdpConfigError(f"{fields.architecture}: config.json leaves no layer with experts.")
    expert_size, shared_size, dense_size = _feed_forward_sizes(fields)
    attention = (_gqa if config.get("kv_lora_rank") is None else _mla)(fields, hidden)
    quantisation = Quantisation.of(config.get("quantization_config"))
    experts, dense = (
        _override("--expert-dtype", expert_dtype),
        _override("--dense-dtype", dense_dtype),
    )
    kv_cache = _override("--kv-dtype", kv_dtype)
    without_experts = sorted(set(range(num_layers)) - set(with_experts))
    sliding_share, sliding_window, sliding_is_chunk = narrow_layers(fields, num_layers)
    return ModelShape(
        name=fields.architecture,
        num_layers=num_layers,
        moe_layers=with_experts,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_params=3 * hidden * expert_size,
        shared_params=3 * hidden * shared_size,
        attention_params=attention[0],
        core_dim=attention[1],
        kv_elements=attention[2],
        dense_mlp_params=3 * hidden * dense_size,
        embedding_params=(1 if config.get("tie_word_embeddings") else 2)
        * fields.first("vocab_size")
        * hidden,
        hidden_size=hidden,
        expert_precision=experts or quantisation.precision("experts", with_experts),
        shared_precision=dense or quantisation.precision("shared", with_experts),
        dense_mlp_precision=dense or quantisation.precision("dense", without_experts),
        attention_precision=dense or quantisation.precision("attention", range(num_layers)),
        kv_bits=kv_cache.bits if kv_cache else quantisation.kv_bits,
        sliding_share=sliding_share,
        sliding_window=sliding_window,
        sliding_is_chunk=sliding_is_chunk,
    )


def _routing(fields: ConfigFields) -> tuple[int, int]:
    """Return the experts of a layer, and how many of them a token is routed to."""
    num_experts = fields.first("n_routed_experts", "num_experts", "num_local_experts", default=0)
    if num_experts < 2:
        raise DwdpConfigError(
            f"{fields.architecture} has no routed experts: there is nothing to share, and vLLM runs "
            "the data-parallel ranks of a dense model independently."
        )
    per_token = fields.first("num_experts_per_tok", "experts_per_token", "moe_top_k")
    if per_token > num_experts:
        raise DwdpConfigError(
            f"{fields.architecture}: config.json routes a token to {per_token} of {num_experts} "
            "experts; it must be no more than there are."
        )
    return num_experts, per_token


def _feed_forward_sizes(fields: ConfigFields) -> tuple[int, int, int]:
    """Return the intermediate sizes of a routed expert, shared experts, a layer without experts."""
    expert = fields.first("moe_intermediate_size", default=0) or fields.first("intermediate_size")
    num_shared = fields.first("n_shared_experts", default=int("llama4" in fields.model_type))
    shared = fields.first("shared_expert_intermediate_size", default=0) or expert * num_shared
    dense = fields.first("intermediate_size_mlp", "intermediate_size", default=0)
    return expert, shared, dense


def _mla(fields: ConfigFields, hidden: int) -> tuple[int, int, int]:
    """Multi-head latent attention: parameters, core size, KV elements per token."""
    heads = fields.first("num_attention_heads")
    nope, rope = fields.first("qk_nope_head_dim"), fields.first("qk_rope_head_dim")
    value, latent = fields.first("v_head_dim"), fields.first("kv_lora_rank")
    query_rank = fields.first("q_lora_rank", default=0)
    query = (
        hidden * query_rank + query_rank * heads * (nope + rope)
        if query_rank
        else hidden * heads * (nope + rope)
    )
    key_value = hidden * (latent + rope) + latent * heads * (nope + value)
    return query + key_value + heads * value * hidden, heads * (nope + rope + value), latent + rope


def _gqa(fields: ConfigFields, hidden: int) -> tuple[int, int, int]:
    """Grouped-query attention: parameters, core size, KV elements per token."""
    heads = fields.first("num_attention_heads")
    groups = fields.first("num_key_value_heads", default=heads)
    size = fields.first("head_dim", default=max(1, hidden // heads), low=1)
    parameters = 2 * hidden * heads * size + 2 * hidden * groups * size
    return parameters, 2 * heads * size, 2 * groups * size


def _override(option: str, dtype: str | None) -> Precision | None:
    if dtype is None:
        return None
    if dtype not in FORMATS:
        raise DwdpConfigError(
            f"{option} {shown(dtype)} is unknown; known are {', '.join(FORMATS)}."
        )
    return Precision.of(FORMATS[dtype])

"""The sizes of an MoE model that matter for its speed, from a Hugging Face config.json."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner import compressed
from vllm_dwdp.planner.adapters import NOTHING, AdapterSize, adapter_size
from vllm_dwdp.planner.attention import attention_of
from vllm_dwdp.planner.checked import shown
from vllm_dwdp.planner.checkpoint import ConfigFields, moe_layers
from vllm_dwdp.planner.feed_forward import feed_forwards
from vllm_dwdp.planner.indexers import indexer_of
from vllm_dwdp.planner.kv_cache import KvCache, kv_cache
from vllm_dwdp.planner.layer_kinds import LayerKind, layer_kinds
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
        num_banks: sets of experts that the layers have; fewer than layers where these share them.
        num_other_layers: layers with as many experts of a second kind, which run for pictures only.
        other_expert_params: of one of these.
        adapters: what a slot for a LoRA adapter takes.
        num_mtp_layers: further layers with experts, which run only to draft tokens.
        num_experts, experts_per_token: of an MoE layer.
        expert_params: of one routed expert.
        shared_params: of the shared experts of a layer.
        dense_mlp_params: of the feed-forward of a layer without experts.
        attention_params: linear weights of a layer's attention, or of what stands in its place, in the
            mean over the layers.
        core_dim: sum over query heads of key and value head sizes: a query and a key cost
            `2 * core_dim` operations.
        kv_cache: what every layer keeps of a sequence.
        embedding_params: embeddings and head, in 16 bits.
        hidden_size: of the residual stream.
        expert_precision, shared_precision, dense_mlp_precision, attention_precision: of the weights.
    """

    name: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_banks: int
    num_experts: int
    experts_per_token: int
    expert_params: int
    shared_params: int
    dense_mlp_params: int
    attention_params: int
    core_dim: int
    kv_cache: KvCache
    embedding_params: int
    hidden_size: int
    expert_precision: Precision
    shared_precision: Precision = _UNQUANTISED
    dense_mlp_precision: Precision = _UNQUANTISED
    attention_precision: Precision = _UNQUANTISED
    num_mtp_layers: int = 0
    num_other_layers: int = 0
    other_expert_params: int = 0
    adapters: AdapterSize = NOTHING

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
    def largest_expert_bytes(self) -> float:
        """The bytes of an expert of the larger kind; a slot has room for a layer of them."""
        return max(self.expert_params, self.other_expert_params) * self.expert_bits / 8

    @property
    def num_expert_layers(self) -> int:
        """The number of times that a forward may come to routed experts: once a layer for each kind."""
        return self.num_moe_layers + self.num_other_layers

    @property
    def layer_expert_bytes(self) -> float:
        """The bytes of one expert of each kind, in the mean over the MoE layers."""
        others = self.num_other_layers * self.other_expert_params / self.num_moe_layers
        return (self.expert_params + others) * self.expert_bits / 8

    @property
    def experts_bytes(self) -> float:
        """The bytes of all routed experts."""
        return self.num_banks * self.num_experts * self.layer_expert_bytes

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

    def kv_bytes_per_token(self, context_tokens: float) -> float:
        """Return the bytes of a sequence of `context_tokens`, states and windows with it, per token."""
        return self.kv_cache.sequence_bytes(context_tokens) / max(1.0, context_tokens)


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
    tensor_parallel_size: int = 1,
) -> ModelShape:
    """Read the shape of a model, whatever its family calls its fields.

    Args:
        config: of the text model.
        expert_dtype, kv_dtype, dense_dtype: override what `quantization_config` says of the routed
            experts, of the KV cache, and of all other linear weights; keys of `FORMATS`.
        tensor_parallel_size: GPUs of a rank, which its KV cache depends on.

    Raises:
        DwdpConfigError: the config describes no routed experts, or a field is missing or wrong.
    """
    fields = ConfigFields(config)
    num_experts, experts_per_token = _routing(fields)
    hidden = fields.first("hidden_size")
    num_layers = fields.num_layers
    with_experts = moe_layers(fields, num_layers)
    if not with_experts:
        raise DwdpConfigError(f"{fields.architecture}: config.json leaves no layer with experts.")
    sizes = feed_forwards(fields, num_layers, with_experts)
    attention_params, core_dim = attention_of(fields, hidden, num_layers)
    other_layers = moe_layers(fields, num_layers, 1) if fields.has_two_kinds else ()
    quantisation = Quantisation.of(config.get("quantization_config"), compressed.experts(fields))
    experts, dense = (
        _override("--expert-dtype", expert_dtype),
        _override("--dense-dtype", dense_dtype),
    )
    kv_type = _override("--kv-dtype", kv_dtype)
    without_experts = sorted(set(range(num_layers)) - set(with_experts))
    asked = compressed.KV_BITS if compressed.is_compressed(fields) else quantisation.kv_bits
    kv_bits = kv_type.bits if kv_type else asked
    cache = kv_cache(fields, num_layers, kv_bits, tensor_parallel_size)
    return ModelShape(
        name=fields.architecture,
        num_layers=num_layers,
        moe_layers=with_experts,
        num_banks=fields.num_banks(len(with_experts)),
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_params=sizes.expert,
        shared_params=sizes.shared,
        attention_params=_mean_attention(fields, cache, attention_params),
        core_dim=core_dim,
        kv_cache=cache,
        dense_mlp_params=sizes.dense,
        embedding_params=(1 if config.get("tie_word_embeddings") else 2)
        * fields.first("vocab_size")
        * hidden,
        hidden_size=hidden,
        expert_precision=experts or quantisation.precision("experts", with_experts),
        shared_precision=dense or quantisation.precision("shared", with_experts),
        dense_mlp_precision=dense or quantisation.precision("dense", without_experts),
        attention_precision=dense or quantisation.precision("attention", range(num_layers)),
        num_mtp_layers=fields.first("num_nextn_predict_layers", default=0),
        num_other_layers=len(other_layers),
        other_expert_params=sizes.other_expert,
        adapters=adapter_size(fields, num_layers, with_experts, num_experts),
    )


def _mean_attention(fields: ConfigFields, cache: KvCache, attention_params: int) -> int:
    """Return the linear weights of a layer that is no feed-forward, in the mean over all layers."""
    kinds = layer_kinds(fields, cache.num_layers)
    of_kind = {LayerKind.NONE: 0, LayerKind.STATE: 0}
    whole = sum(of_kind.get(kind, attention_params) for kind in kinds) * fields.attentions_per_layer
    if not compressed.is_compressed(fields):
        attending = (layer for layer, kind in enumerate(kinds) if kind not in of_kind)
        indexers = (indexer_of(fields, layer, len(kinds)) for layer in attending)
        whole += sum(each.params for each in indexers if each)
    return round((whole + sum(part.state.params for part in cache.parts)) / len(kinds))


def _routing(fields: ConfigFields) -> tuple[int, int]:
    """Return the experts of a layer, and how many of them a token is routed to."""
    num_experts = fields.most(
        "n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", default=0
    )
    if num_experts < 2:
        raise DwdpConfigError(
            f"{fields.architecture} has no routed experts: there is nothing to share, and vLLM runs "
            "the data-parallel ranks of a dense model independently."
        )
    names = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token")
    per_token = fields.most(*names, "moe_top_k", "moe_topk", "moe_k", "top_k_experts")
    if per_token > num_experts:
        raise DwdpConfigError(
            f"{fields.architecture}: config.json routes a token to {per_token} of {num_experts} "
            "experts; it must be no more than there are."
        )
    return num_experts, per_token


def _override(option: str, dtype: str | None) -> Precision | None:
    if dtype is None:
        return None
    if dtype not in FORMATS:
        raise DwdpConfigError(
            f"{option} {shown(dtype)} is unknown; known are {', '.join(FORMATS)}."
        )
    return Precision.of(FORMATS[dtype])

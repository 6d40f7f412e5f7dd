"""The sizes of an MoE model that matter for its speed, from a Hugging Face config.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.quantisation import BITS, Quantisation


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Parameters and operations per layer.

    Args:
        name: architecture.
        num_layers, num_moe_layers: all layers, and those with routed experts.
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
        expert_bits, shared_bits, dense_mlp_bits, attention_bits, kv_bits: of each weight or element.
        sliding_share, sliding_window: part of the layers whose tokens see at most so many keys.
    """

    name: str
    num_layers: int
    num_moe_layers: int
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
    expert_bits: float
    shared_bits: float = 16.0
    dense_mlp_bits: float = 16.0
    attention_bits: float = 16.0
    kv_bits: float = 16.0
    sliding_share: float = 0.0
    sliding_window: int = 0

    @property
    def expert_bytes(self) -> float:
        """Of one routed expert."""
        return self.expert_params * self.expert_bits / 8

    @property
    def experts_bytes(self) -> float:
        """Of all routed experts of all layers."""
        return self.num_moe_layers * self.num_experts * self.expert_bytes

    @property
    def dense_bytes(self) -> float:
        """Of everything that every rank holds."""
        bits = (
            self.num_moe_layers * self.shared_params * self.shared_bits
            + (self.num_layers - self.num_moe_layers) * self.dense_mlp_params * self.dense_mlp_bits
            + self.num_layers * self.attention_params * self.attention_bits
            + self.embedding_params * 16
        )
        return bits / 8

    def kv_bytes_per_token(self, context_tokens: float) -> float:
        """Of the KV cache, all layers, of a sequence of `context_tokens`."""
        seen = min(1.0, self.sliding_window / max(1.0, context_tokens))
        layers = self.num_layers * (1.0 - self.sliding_share + self.sliding_share * seen)
        return layers * self.kv_elements * self.kv_bits / 8


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, or the one in a model folder.

    Raises:
        DwdpConfigError: it cannot be read, or is no JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    config = _read_object(file)
    beside = file.with_name("hf_quant_config.json")  # ModelOpt's older exports
    if "quantization_config" not in config and beside.is_file():
        config["quantization_config"] = _read_object(beside).get("quantization")
    inner = config.get("text_config")
    if isinstance(inner, dict):
        config = {key: value for key, value in config.items() if key != "text_config"} | inner
    return config


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DwdpConfigError(f"--model {file}: {error}.") from error
    if not isinstance(content, dict):
        raise DwdpConfigError(f"--model {file}: it must be a JSON object.")
    return content


def shape_of(
    config: dict[str, Any], expert_dtype: str | None = None, kv_dtype: str | None = None
) -> ModelShape:
    """The shape of DeepSeek-V2/V3, Qwen2/3-MoE, gpt-oss, Mixtral, GLM-4-MoE, Llama-4 and their like.

    Args:
        config: of the text model.
        expert_dtype, kv_dtype: override what `quantization_config` says of the routed experts and
            of the KV cache; keys of `BITS`.

    Raises:
        DwdpConfigError: the config describes no routed experts, or a field is missing.
    """
    fields = _Fields(config)
    num_experts = fields.first("n_routed_experts", "num_experts", "num_local_experts", default=0)
    if num_experts < 2:
        raise DwdpConfigError(
            f"{fields.architecture} has no routed experts: there is nothing to share, and vLLM runs "
            "the data-parallel ranks of a dense model independently."
        )
    hidden = fields.first("hidden_size")
    dense_size = fields.first("intermediate_size_mlp", "intermediate_size", default=0)
    expert_size = fields.first("moe_intermediate_size", default=0) or fields.first(
        "intermediate_size"
    )
    num_layers = fields.first("num_hidden_layers")
    num_moe_layers = _count_moe_layers(fields, num_layers)
    shared_size = fields.first("shared_expert_intermediate_size", default=0) or (
        expert_size * fields.first("n_shared_experts", default=int("llama4" in fields.model_type))
    )
    attention = _mla(fields, hidden) if "kv_lora_rank" in config else _gqa(fields, hidden)
    vocabulary = fields.first("vocab_size")
    quantisation = Quantisation.of(config.get("quantization_config"))
    sliding_share, sliding_window = _sliding(config, fields, num_layers)
    tied = 1 if config.get("tie_word_embeddings") else 2
    experts_per_token = fields.first("num_experts_per_tok", "experts_per_token", "moe_top_k")
    if not 1 <= experts_per_token <= num_experts:
        raise DwdpConfigError(
            f"{fields.architecture}: config.json routes a token to {experts_per_token} of "
            f"{num_experts} experts; it must be at least one, and no more than there are."
        )
    if num_moe_layers < 1:
        raise DwdpConfigError(f"{fields.architecture}: config.json leaves no layer with experts.")
    return ModelShape(
        name=fields.architecture,
        num_layers=num_layers,
        num_moe_layers=num_moe_layers,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_params=3 * hidden * expert_size,
        shared_params=3 * hidden * shared_size,
        attention_params=attention[0],
        core_dim=attention[1],
        kv_elements=attention[2],
        dense_mlp_params=3 * hidden * dense_size,
        embedding_params=tied * vocabulary * hidden,
        hidden_size=hidden,
        expert_bits=_override("--expert-dtype", expert_dtype)
        or quantisation.bits("experts", num_layers),
        shared_bits=_override("--expert-dtype", expert_dtype)
        or quantisation.bits("shared", num_layers),
        dense_mlp_bits=quantisation.bits("dense", num_layers),
        attention_bits=quantisation.bits("attention", num_layers),
        kv_bits=_override("--kv-dtype", kv_dtype) or quantisation.kv_bits,
        sliding_share=sliding_share,
        sliding_window=sliding_window,
    )


class _Fields:
    """Integer fields of a config, whatever the family calls them."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self.model_type = str(config.get("model_type", ""))
        self.architecture = str((config.get("architectures") or [self.model_type or "model"])[0])

    def first(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self._config.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                if value < (0 if default is not None else 1):
                    raise DwdpConfigError(
                        f"{self.architecture}: {name} in config.json is {value}; it must be positive."
                    )
                return value
        if default is None:
            raise DwdpConfigError(f"{self.architecture}: config.json has no {' or '.join(names)}.")
        return default

    def listed(self, name: str) -> list[int]:
        value = self._config.get(name)
        return list(value) if isinstance(value, list) else []


def _count_moe_layers(fields: _Fields, num_layers: int) -> int:
    listed = fields.listed("moe_layers")
    if listed:
        return len(listed)
    dense_first = fields.first("first_k_dense_replace", default=0)
    every = fields.first("decoder_sparse_step", "interleave_moe_layer_step", default=1)
    dense = set(fields.listed("mlp_only_layers"))
    return sum(
        layer >= dense_first and (layer + 1) % every == 0 and layer not in dense
        for layer in range(num_layers)
    )


def _mla(fields: _Fields, hidden: int) -> tuple[int, int, int]:
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


def _gqa(fields: _Fields, hidden: int) -> tuple[int, int, int]:
    """Grouped-query attention: parameters, core size, KV elements per token."""
    heads = fields.first("num_attention_heads")
    groups = fields.first("num_key_value_heads", default=heads)
    size = fields.first("head_dim", default=hidden // heads)
    parameters = 2 * hidden * heads * size + 2 * hidden * groups * size
    return parameters, 2 * heads * size, 2 * groups * size


def _sliding(config: dict[str, Any], fields: _Fields, num_layers: int) -> tuple[float, int]:
    """The part of the layers with a window (or chunks), and its tokens."""
    window = fields.first("sliding_window", "attention_chunk_size", default=0)
    types = config.get("layer_types")
    if not window or not isinstance(types, list):
        return 0.0, 0
    narrow = sum(kind in ("sliding_attention", "chunked_attention") for kind in types)
    return min(1.0, narrow / num_layers), window


def _override(option: str, dtype: str | None) -> float | None:
    if dtype is None:
        return None
    if dtype not in BITS:
        raise DwdpConfigError(f"{option} {dtype!r} is unknown; known are {', '.join(BITS)}.")
    return BITS[dtype]

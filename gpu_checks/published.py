"""Small checkpoints of families whose code is published with their weights: transformers has none.

Their tensors are listed here, by the names that published checkpoints have; vLLM refuses a name that it
does not know, and a parameter that it is not given. Where transformers and vLLM do not know the
configuration either, the checkpoint brings its own, as published ones do.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gpu_checks.families import EXPERTS, HEADS, LATENT
from vllm_dwdp.entrypoints.bench.checkpoints import DONE, save_tokenizer

Shapes = dict[str, tuple[int, ...]]
Fields = dict[str, Any]

CONFIGURATION = """from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "{model_type}"

    def __init__(self, vision_config=None, **fields):
        if vision_config is not None:
            self.vision_config = PretrainedConfig(**vision_config)
        super().__init__(**fields)
"""

COMMON: Fields = (
    HEADS | EXPERTS | {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
)
GROUPED: Fields = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A family.

    Args:
        architecture, model_type: in config.json.
        experts: the field that counts them; empty if `fields` does, kind by kind.
        fields: others, beside `COMMON`.
        tensors: names and shapes, of the fields; None if nothing reads them.
        has_own_configuration: the checkpoint brings the class of its config.
        without: names in `COMMON` that the family does not have.
    """

    architecture: str
    model_type: str
    experts: str
    fields: Fields
    tensors: Callable[[Fields], Shapes] | None = None
    has_own_configuration: bool = True
    without: tuple[str, ...] = ()

    def config(self, num_experts: int, overrides: Fields) -> Fields:
        """Return the content of config.json."""
        common = {name: value for name, value in COMMON.items() if name not in self.without}
        mapped = {"auto_map": {"AutoConfig": "configuration.OwnConfig"}}
        return (
            common
            | {"architectures": [self.architecture], "model_type": self.model_type}
            | (mapped if self.has_own_configuration else {})
            | self.fields
            | ({self.experts: num_experts} if self.experts else {})
            | overrides
        )


TABLE = ".tid2eid"
"""The end of the name of what holds experts, of which there are `num_experts`, and no weights."""


def write_published(
    folder: Path, family: Published, num_experts: int, seed: int, **overrides: Any
) -> Path:
    """Write config, configuration, tokenizer and random bf16 weights; one that is there is kept."""
    done = folder / DONE
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = family.config(num_experts, overrides)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if family.has_own_configuration:
        code = CONFIGURATION.format(model_type=family.model_type)
        (folder / "configuration.py").write_text(code)
    save_tokenizer(folder)
    if family.tensors is not None:
        dice = torch.Generator().manual_seed(seed)
        shapes = family.tensors(config)
        tensors = {
            name: torch.randint(num_experts, shape, generator=dice, dtype=torch.int32)
            if name.endswith(TABLE)
            else _random(name, shape, dice)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done.touch()
    return folder


def _random(name: str, shape: tuple[int, ...], dice: torch.Generator) -> torch.Tensor:
    """Return weights by which every expert and every token visibly changes the output."""
    if len(shape) == 1 and "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 0.15 if "expert" in name or "mlp" in name or "moe" in name else 0.08
    return (torch.randn(shape, generator=dice) * scale).to(torch.bfloat16)


def _all(parts: Iterable[Shapes]) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}


def _weights(prefix: str, **shapes: tuple[int, ...]) -> Shapes:
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


def _model(
    config: Fields, layer: Callable[[str, int], Shapes], embedding: str = "embed_tokens"
) -> Shapes:
    """List a whole model: embeddings, `layer` of every prefix and number, norm and head."""
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    count = config.get("num_layers") or config["num_hidden_layers"]
    layers = (layer(f"model.layers.{number}", number) for number in range(count))
    ends = _weights("model", **{embedding: (vocabulary, hidden), "norm": (hidden,)})
    return ends | _all(layers) | {"lm_head.weight": (vocabulary, hidden)}


def _norms(prefix: str, config: Fields, *others: str) -> Shapes:
    names = ("input_layernorm", "post_attention_layernorm", *others)
    return _weights(prefix, **dict.fromkeys(names, (config["hidden_size"],)))


def _mlp(prefix: str, config: Fields, width: int, *count: int) -> Shapes:
    """List a gated feed-forward; `count` of them in one tensor if given."""
    up, down = (*count, width, config["hidden_size"]), (*count, config["hidden_size"], width)
    return _weights(prefix, gate_proj=up, up_proj=up, down_proj=down)


def _experts(prefix: str, config: Fields, count: int) -> Shapes:
    width = config.get("expert_ffn_hidden_size") or config["moe_intermediate_size"]
    return _all(_mlp(f"{prefix}.experts.{expert}", config, width) for expert in range(count))


def _routed(prefix: str, config: Fields, count: int, bias: str = "", shared: int = 1) -> Shapes:
    """List a router, with the `bias` of its choice if named, routed experts and shared ones."""
    router = _weights(prefix, gate=(count, config["hidden_size"]))
    biases: Shapes = {f"{prefix}.{bias}": (count,)} if bias else {}
    width = config["moe_intermediate_size"] * shared
    besides = _mlp(f"{prefix}.shared_experts", config, width) if shared else {}
    return router | biases | _experts(prefix, config, count) | besides


def _latent_attention(prefix: str, config: Fields) -> Shapes:
    heads, rank, hidden = (
        config["num_attention_heads"],
        config["kv_lora_rank"],
        config["hidden_size"],
    )
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    rows, middle = heads * (nope + rope), config["q_lora_rank"]
    queries = (
        {"q_proj": (rows, hidden)}
        if middle is None
        else {
            "q_a_proj": (middle, hidden),
            "q_a_layernorm": (middle,),
            "q_b_proj": (rows, middle),
        }
    )
    return _weights(
        prefix,
        **queries,
        kv_a_proj_with_mqa=(rank + rope, hidden),
        kv_a_layernorm=(rank,),
        kv_b_proj=(heads * (nope + value), rank),
        o_proj=(hidden, heads * value),
    )


def _attention(prefix: str, config: Fields, groups: str = "num_key_value_heads") -> Shapes:
    hidden, size = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config[groups] * size
    return _weights(
        prefix,
        q_proj=(queries, hidden),
        k_proj=(keys, hidden),
        v_proj=(keys, hidden),
        o_proj=(hidden, queries),
    )


def _packed_attention(prefix: str, config: Fields, packed: str, out: str) -> Shapes:
    """List an attention whose queries, keys and values come from one matrix."""
    hidden, size = config["hidden_size"], config["head_dim"]
    queries, keys = (
        config["num_attention_heads"] * size,
        2 * config["num_key_value_heads"] * size,
    )
    return _weights(prefix, **{packed: (queries + keys, hidden), out: (hidden, queries)})


def _bailing_attention(prefix: str, config: Fields, number: int) -> Shapes:
    size = (config["head_dim"],)
    has_norms = config.get("use_qk_norm")
    norms = _weights(prefix, query_layernorm=size, key_layernorm=size) if has_norms else {}
    period = config.get("layer_group_size")
    if not period:
        return _packed_attention(prefix, config, "query_key_value", "dense") | norms
    if (number + 1) % period == 0:
        latent = _latent_attention(prefix, config)
        return latent | {f"{prefix}.dense.weight": latent.pop(f"{prefix}.o_proj.weight")}
    whole, hidden = config["num_attention_heads"] * config["head_dim"], config["hidden_size"]
    gate = _weights(prefix, g_proj=(whole, hidden), g_norm=(whole,))
    linear = config | {"num_key_value_heads": config["num_attention_heads"]}
    return _packed_attention(prefix, linear, "query_key_value", "dense") | gate | norms


def _bailing(config: Fields) -> Shapes:
    count = config["num_experts"]
    bias = "gate.expert_bias" if config.get("moe_router_enable_expert_bias") else ""

    def layer(prefix: str, number: int) -> Shapes:
        dense = number < config["first_k_dense_replace"]
        return (
            _norms(prefix, config)
            | _bailing_attention(f"{prefix}.attention", config, number)
            | (
                _mlp(f"{prefix}.mlp", config, config["intermediate_size"])
                if dense
                else _routed(f"{prefix}.mlp", config, count, bias)
            )
        )

    return _model(config, layer, "word_embeddings")


def _deepseek(config: Fields) -> Shapes:
    return _model(
        config,
        lambda prefix, number: (
            _norms(prefix, config)
            | _attention(f"{prefix}.self_attn", config)
            | _feed_forward(prefix, number, config, "n_routed_experts")
        ),
    )


def _feed_forward(prefix: str, number: int, config: Fields, experts: str, bias: str = "") -> Shapes:
    """List a dense feed-forward in the first layers, experts in the others."""
    if number < config["first_k_dense_replace"]:
        return _mlp(f"{prefix}.mlp", config, config["intermediate_size"])
    return _routed(f"{prefix}.mlp", config, config[experts], bias)


def _sarvam_mla(config: Fields) -> Shapes:
    return _model(
        config,
        lambda prefix, number: (
            _norms(prefix, config)
            | _latent_attention(f"{prefix}.self_attn", config)
            | _feed_forward(prefix, number, config, "num_experts", "gate.e_score_correction_bias")
        ),
    )


def _pangu_ultra(config: Fields) -> Shapes:
    return _model(
        config,
        lambda prefix, number: (
            _norms(prefix, config, "pre_mlp_layernorm", "post_mlp_layernorm")
            | _latent_attention(f"{prefix}.self_attn", config)
            | _feed_forward(prefix, number, config, "n_routed_experts", "e_score_correction_bias")
        ),
    )


def _mimo_v2(config: Fields) -> Shapes:
    def layer(prefix: str, number: int) -> Shapes:
        inner = f"{prefix}.mlp"
        return (
            _norms(prefix, config)
            | _packed_attention(f"{prefix}.self_attn", config, "qkv_proj", "o_proj")
            | (
                _routed(
                    inner,
                    config,
                    config["n_routed_experts"],
                    "gate.e_score_correction_bias",
                    shared=0,
                )
                if config["moe_layer_freq"][number]
                else _mlp(inner, config, config["intermediate_size"])
            )
        )

    return _model(config, layer)


def _longcat(config: Fields) -> Shapes:
    """List two attentions and two feed-forwards a layer, and a router of more than the experts."""

    def layer(prefix: str, number: int) -> Shapes:
        inner, count = f"{prefix}.mlp", config["n_routed_experts"]
        choices = count + config["zero_expert_num"]
        return (
            _all(
                _latent_attention(f"{prefix}.self_attn.{half}", config)
                | _mlp(f"{prefix}.mlps.{half}", config, config["ffn_hidden_size"])
                | {
                    f"{prefix}.{norm}.{half}.weight": (config["hidden_size"],)
                    for norm in ("input_layernorm", "post_attention_layernorm")
                }
                for half in range(2)
            )
            | _weights(f"{inner}.router", classifier=(choices, config["hidden_size"]))
            | {f"{inner}.router.e_score_correction_bias": (choices,)}
            | _experts(inner, config, count)
        )

    return _model(config, layer)


def _kimi_linear(config: Fields) -> Shapes:
    """List delta attention in some layers, and experts whose matrices are called by numbers."""
    hidden, count, linear = (
        config["hidden_size"],
        config["num_experts"],
        config["linear_attn_config"],
    )
    size, heads = linear["head_dim"], linear["num_heads"]
    whole, width = heads * size, config["moe_intermediate_size"]

    def delta_attention(prefix: str) -> Shapes:
        convolution = (whole, 1, linear["short_conv_kernel_size"])
        each = _all(
            _weights(prefix, **{f"{name}_proj": (whole, hidden), f"{name}_conv1d": convolution})
            for name in "qkv"
        )
        gates = _all(
            _weights(prefix, **{f"{name}_a_proj": (size, hidden), f"{name}_b_proj": (whole, size)})
            for name in "fg"
        )
        others = _weights(prefix, b_proj=(heads, hidden), o_norm=(size,), o_proj=(hidden, whole))
        return (
            each
            | gates
            | others
            | {f"{prefix}.A_log": (1, 1, heads, 1), f"{prefix}.dt_bias": (whole,)}
        )

    def experts(prefix: str) -> Shapes:
        up, down = (width, hidden), (hidden, width)
        return (
            _weights(prefix, gate=(count, hidden))
            | {f"{prefix}.gate.e_score_correction_bias": (count,)}
            | _all(
                _weights(f"{prefix}.experts.{expert}", w1=up, w2=down, w3=up)
                for expert in range(count)
            )
            | _mlp(f"{prefix}.shared_experts", config, width)
        )

    def layer(prefix: str, number: int) -> Shapes:
        inner, dense = f"{prefix}.self_attn", number < config["first_k_dense_replace"]
        counted_from_one = number + 1 in linear["kda_layers"]
        return (
            _norms(prefix, config)
            | (delta_attention(inner) if counted_from_one else _latent_attention(inner, config))
            | (
                _mlp(f"{prefix}.mlp", config, config["intermediate_size"])
                if dense
                else experts(f"{prefix}.block_sparse_moe")
            )
        )

    return _model(config, layer)


def _step3(config: Fields, attention: Callable[[str], Shapes], **biases: int) -> Shapes:
    count = config["moe_num_experts"]
    with_experts = [int(number) for number in config["moe_layers_enum"].split(",")]

    def layer(prefix: str, number: int) -> Shapes:
        if number in with_experts:
            rest = (
                _weights(f"{prefix}.moe", gate=(count, config["hidden_size"]))
                | {f"{prefix}.moe.{name}": (size,) for name, size in biases.items()}
                | _mlp(f"{prefix}.moe", config, config["moe_intermediate_size"], count)
                | _mlp(f"{prefix}.share_expert", config, config["share_expert_dim"])
            )
        else:
            rest = _mlp(f"{prefix}.mlp", config, config["intermediate_size"])
        return _norms(prefix, config) | attention(f"{prefix}.self_attn") | rest

    return _model(config, layer)


def _step3_text(config: Fields) -> Shapes:
    hidden, size, queries = config["hidden_size"], config["head_dim"], config["share_q_dim"]
    heads = config["num_attention_heads"]
    return _step3(
        config,
        lambda prefix: _weights(
            prefix,
            q_proj=(queries, hidden),
            k_proj=(size, hidden),
            v_proj=(size, hidden),
            inter_norm=(queries,),
            wq=(heads * size, queries),
            o_proj=(hidden, heads * size),
        ),
    )


def _step3p5(config: Fields) -> Shapes:
    def attention(prefix: str) -> Shapes:
        size, hidden = config["head_dim"], config["hidden_size"]
        return _attention(prefix, config, "num_attention_groups") | _weights(
            prefix,
            q_norm=(size,),
            k_norm=(size,),
            g_proj=(config["num_attention_heads"], hidden),
        )

    return _step3(config, attention, router_bias=config["moe_num_experts"])


def _ernie_vl(config: Fields) -> Shapes:
    """List the language model: experts for text in a layer, and as many others for images."""
    hidden, (count, others) = config["hidden_size"], config["moe_num_experts"]
    widths = [config["moe_intermediate_size"][expert >= count] for expert in range(count + others)]

    def layer(prefix: str, number: int) -> Shapes:
        inner = f"{prefix}.mlp"
        if number < min(config["moe_layer_start_index"]):
            rest = _mlp(inner, config, config["intermediate_size"])
        else:
            rest = (
                {
                    f"{inner}.gate.weight": (hidden, count),
                    f"{inner}.gate.weight_1": (hidden, others),
                }
                | {f"{inner}.moe_statics.e_score_correction_bias": (2, count)}
                | _mlp(f"{inner}.shared_experts", config, widths[0])
                | _all(
                    _mlp(f"{inner}.experts.{expert}", config, width)
                    for expert, width in enumerate(widths)
                )
            )
        return _norms(prefix, config) | _attention(f"{prefix}.self_attn", config) | rest

    return _model(config, layer)


def _deepseek_v4(config: Fields) -> Shapes:
    """List DeepSeek's own names: streams that are mixed, layers that compress what they keep.

    The first layers choose experts by a table of tokens.
    """
    hidden, vocabulary, streams = config["hidden_size"], config["vocab_size"], config["hc_mult"]
    count, width = config["n_routed_experts"], config["moe_intermediate_size"]

    def mixing(prefix: str, rows: int, scales: int) -> Shapes:
        sizes = {"fn": (rows, streams * hidden), "base": (rows,), "scale": (scales,)}
        return {f"{prefix}_{name}": shape for name, shape in sizes.items()}

    def compressor(prefix: str, ratio: int, size: int) -> Shapes:
        rows = size * (1 + (ratio == 4))
        inner = _weights(prefix, wkv=(rows, hidden), wgate=(rows, hidden), norm=(size,))
        return inner | {f"{prefix}.ape": (ratio, rows)}

    def attention(prefix: str, ratio: int) -> Shapes:
        heads, size, rank = (
            config[name] for name in ("num_attention_heads", "head_dim", "q_lora_rank")
        )
        groups, out = config["o_groups"], config["o_lora_rank"]
        found = {f"{prefix}.attn_sink": (heads,)} | _weights(
            prefix,
            wq_a=(rank, hidden),
            wkv=(size, hidden),
            q_norm=(rank,),
            kv_norm=(size,),
            wq_b=(heads * size, rank),
            wo_a=(groups * out, heads * size // groups),
            wo_b=(hidden, groups * out),
        )
        if ratio:
            found |= compressor(f"{prefix}.compressor", ratio, size)
        if ratio == 4:
            indexers, index_size = config["index_n_heads"], config["index_head_dim"]
            found |= compressor(f"{prefix}.indexer.compressor", ratio, index_size)
            found |= _weights(
                f"{prefix}.indexer",
                wq_b=(indexers * index_size, rank),
                weights_proj=(indexers, hidden),
            )
        return found

    def layer(number: int) -> Shapes:
        prefix, inner = f"layers.{number}", f"layers.{number}.ffn"
        is_hashed = number < config["num_hash_layers"]
        hashed = {f"{inner}.gate.tid2eid": (vocabulary, config["num_experts_per_tok"])}
        gated = {"w1": (width, hidden), "w2": (hidden, width), "w3": (width, hidden)}
        experts = (f"experts.{expert}" for expert in range(count))
        return (
            _weights(prefix, attn_norm=(hidden,), ffn_norm=(hidden,))
            | mixing(f"{prefix}.hc_attn", (2 + streams) * streams, 3)
            | mixing(f"{prefix}.hc_ffn", (2 + streams) * streams, 3)
            | attention(f"{prefix}.attn", config["compress_ratios"][number])
            | _weights(inner, gate=(count, hidden))
            | (hashed if is_hashed else {f"{inner}.gate.bias": (count,)})
            | _all(_weights(f"{inner}.{each}", **gated) for each in (*experts, "shared_experts"))
        )

    ends = {"embed.weight": (vocabulary, hidden), "head.weight": (vocabulary, hidden)}
    layers = _all(layer(number) for number in range(config["num_hidden_layers"]))
    return ends | {"norm.weight": (hidden,)} | mixing("hc_head", streams, 1) | layers


BAILING_V2: Fields = GROUPED | {
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "use_rmsnorm": True,
    "partial_rotary_factor": 0.5,
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "num_shared_experts": 1,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
}

PUBLISHED: dict[str, Published] = {
    "bailing_moe": Published(
        architecture="BailingMoeForCausalLM",
        model_type="bailing_moe",
        experts="num_experts",
        fields={
            "use_bias": False,
            "use_qkv_bias": False,
            "embedding_dropout": 0.0,
            "first_k_dense_replace": 0,
            "norm_head": True,
            "norm_topk_prob": True,
            "num_shared_experts": 1,
        },
        tensors=_bailing,
    ),
    "bailing_moe_v2": Published(
        architecture="BailingMoeV2ForCausalLM",
        model_type="bailing_moe",
        experts="num_experts",
        fields=BAILING_V2,
        tensors=_bailing,
    ),
    "sarvam_moe": Published(
        architecture="SarvamMoEForCausalLM",
        model_type="sarvam_moe",
        experts="num_experts",
        fields=BAILING_V2,
        tensors=_bailing,
    ),
    "sarvam_mla": Published(
        architecture="SarvamMLAForCausalLM",
        model_type="sarvam_mla",
        experts="num_experts",
        fields=LATENT
        | GROUPED
        | {
            "q_lora_rank": None,
            "head_dim": 576,
            "first_k_dense_replace": 1,
            "num_shared_experts": 1,
        },
        tensors=_sarvam_mla,
    ),
    "param2_moe": Published(
        architecture="Param2MoEForCausalLM",
        model_type="param2moe",
        experts="num_experts",
        fields=BAILING_V2 | {"rope_scaling": None, "partial_rotary_factor": 1.0},
        tensors=_bailing,
    ),
    "deepseek": Published(
        architecture="DeepseekForCausalLM",
        model_type="deepseek",
        experts="n_routed_experts",
        fields={
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "n_shared_experts": 1,
            "norm_topk_prob": False,
            "scoring_func": "softmax",
            "topk_method": "greedy",
        },
        tensors=_deepseek,
    ),
    "pangu_ultra_moe": Published(
        architecture="PanguUltraMoEForCausalLM",
        model_type="pangu_ultra_moe",
        experts="n_routed_experts",
        fields=LATENT
        | {
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "router_enable_expert_bias": True,
            "sandwich_norm": True,
        },
        tensors=_pangu_ultra,
        without=("head_dim",),
    ),
    "mimo_v2": Published(
        architecture="MiMoV2ForCausalLM",
        model_type="mimo_v2",
        experts="n_routed_experts",
        fields={
            "v_head_dim": 32,
            "sliding_window": 64,
            "sliding_window_size": 64,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "hybrid_layer_pattern": [1, 1, 0],
            "moe_layer_freq": [0, 1, 1],
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 32,
            "swa_v_head_dim": 32,
            "swa_rope_theta": 10000.0,
            "layernorm_epsilon": 1e-5,
            "attention_bias": False,
            "partial_rotary_factor": 1.0,
        },
        tensors=_mimo_v2,
    ),
    "longcat_flash": Published(
        architecture="LongcatFlashForCausalLM",
        model_type="longcat_flash",
        experts="n_routed_experts",
        fields=LATENT
        | {
            "num_layers": 2,
            "ffn_hidden_size": 160,
            "expert_ffn_hidden_size": 96,
            "moe_topk": 3,
            "zero_expert_num": 4,
            "zero_expert_type": "identity",
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "routed_scaling_factor": 1.5,
        },
        tensors=_longcat,
        has_own_configuration=False,
        without=(
            "head_dim",
            "num_hidden_layers",
            "intermediate_size",
            "moe_intermediate_size",
            "num_experts_per_tok",
        ),
    ),
    "step3_text": Published(
        architecture="Step3TextForCausalLM",
        model_type="step3_text",
        experts="moe_num_experts",
        fields={
            "num_attention_groups": 1,
            "share_q_dim": 64,
            "share_expert_dim": 96,
            "moe_top_k": 2,
            "moe_layers_enum": "1,2",
            "norm_expert_weight": False,
            "max_position_embedding": 2048,
            "max_seq_len": 2048,
        },
        tensors=_step3_text,
        has_own_configuration=False,
        without=("num_key_value_heads", "num_experts_per_tok", "max_position_embeddings"),
    ),
    "step3p5": Published(
        architecture="Step3p5ForCausalLM",
        model_type="step3p5",
        experts="moe_num_experts",
        fields={
            "num_attention_groups": 2,
            "share_expert_dim": 96,
            "moe_top_k": 2,
            "moe_layers_enum": "1,2",
            "moe_router_activation": "sigmoid",
            "moe_router_scaling_factor": 3.0,
            "norm_expert_weight": True,
            "need_fp32_gate": True,
            "use_moe_router_bias": True,
            "use_head_wise_attn_gate": True,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "attention_other_setting": {
                "attention_type": "sliding_attention",
                "num_attention_heads": 4,
                "num_attention_groups": 2,
                "head_dim": 32,
            },
            "sliding_window": 64,
            "max_seq_len": 2048,
        },
        tensors=_step3p5,
        has_own_configuration=False,
        without=("num_key_value_heads", "num_experts_per_tok"),
    ),
    "ernie4_5_vl_moe": Published(
        architecture="Ernie4_5_VLMoeForConditionalGeneration",
        model_type="ernie4_5_moe_vl",
        experts="",
        fields={
            "moe_num_experts": [8, 8],
            "moe_intermediate_size": [96, 64],
            "moe_layer_start_index": [1, 1],
            "moe_layer_end_index": [2, 2],
            "moe_layer_interval": 1,
            "moe_num_shared_experts": 1,
            "moe_k": 2,
            "use_bias": False,
            "freq_allocation": 4,
            "im_patch_id": 500,
            "pixel_hidden_size": 64,
            "spatial_conv_size": 2,
            "temporal_conv_size": 2,
            "use_temporal_conv": True,
            "vision_config": {
                "depth": 1,
                "embed_dim": 64,
                "hidden_size": 64,
                "in_channels": 3,
                "mlp_ratio": 2,
                "num_heads": 2,
                "patch_size": 14,
                "spatial_merge_size": 2,
            },
        },
        tensors=_ernie_vl,
        without=("num_experts_per_tok",),
    ),
    "bailing_moe_v2_5": Published(
        architecture="BailingMoeV2_5ForCausalLM",
        model_type="bailing_hybrid",
        experts="num_experts",
        fields=BAILING_V2 | LATENT | {"layer_group_size": 3, "head_dim": 32, "group_norm_size": 4},
        tensors=_bailing,
    ),
    "kimi_linear": Published(
        architecture="KimiLinearForCausalLM",
        model_type="kimi_linear",
        experts="num_experts",
        fields=LATENT
        | {
            "q_lora_rank": None,
            "mla_use_nope": True,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "num_expert_group": 1,
            "topk_group": 1,
            "use_grouped_topk": True,
            "moe_renormalize": True,
            "moe_router_activation_func": "sigmoid",
            "routed_scaling_factor": 2.446,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "linear_attn_config": {
                "kda_layers": [1, 2],
                "full_attn_layers": [3],
                "num_heads": 2,
                "head_dim": 128,
                "short_conv_kernel_size": 4,
            },
        },
        tensors=_kimi_linear,
        has_own_configuration=False,
    ),
    "pangu_pro_moe_v2": Published(
        architecture="PanguProMoEV2ForCausalLM",
        model_type="pangu_pro_moe_v2",
        experts="n_routed_experts",
        fields={
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "router_enable_expert_bias": True,
            "sandwich_norm": True,
            "qk_nope_dim": 32,
            "qk_rope_dim": 32,
            "v_channels": 64,
            "param_sink_number": 128,
            "param_sink_with_value": True,
        },
        without=("head_dim",),
    ),
    "deepseek_v4": Published(
        architecture="DeepseekV4ForCausalLM",
        model_type="deepseek_v4",
        experts="n_routed_experts",
        fields={
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "head_dim": 512,
            "qk_rope_head_dim": 64,
            "q_lora_rank": 128,
            "o_lora_rank": 128,
            "o_groups": 2,
            "sliding_window": 128,
            "compress_ratios": [0, 0, 4, 128],
            "index_topk": 64,
            "index_head_dim": 128,
            "index_n_heads": 4,
            "hc_mult": 4,
            "hc_sinkhorn_iters": 20,
            "hc_eps": 1e-6,
            "num_hash_layers": 1,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "swiglu_limit": 10.0,
            "compress_rope_theta": 160000.0,
            "moe_intermediate_size": 128,
            "rope_scaling": {
                "type": "yarn",
                "rope_type": "yarn",
                "factor": 4,
                "original_max_position_embeddings": 512,
                "beta_fast": 32,
                "beta_slow": 1,
            },
        },
        tensors=_deepseek_v4,
        has_own_configuration=False,
    ),
    "dots3_note": Published(
        architecture="Dots3NoteForCausalLM",
        model_type="dots3_note",
        experts="n_routed_experts",
        fields=LATENT | GROUPED | {"first_k_dense_replace": 1, "n_shared_experts": 1},
        has_own_configuration=False,
        without=("head_dim",),
    ),
}
"""By name; what `gpu_checks.checkpoints` writes beside `FAMILIES`."""

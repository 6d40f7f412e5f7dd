"""Names and shapes of the tensors of families with layers, or names, of their own."""

from collections.abc import Callable

from gpu_checks.published.parts import (
    attention,
    delta_attention,
    experts,
    joined,
    latent_attention,
    mlp,
    model,
    norms,
    weights,
)
from gpu_checks.published.writing import Fields, Shapes


def longcat(config: Fields) -> Shapes:
    """List two attentions and two feed-forwards a layer, and a router of more than the experts."""

    def layer(prefix: str, number: int) -> Shapes:
        inner, count = f"{prefix}.mlp", config["n_routed_experts"]
        choices = count + config["zero_expert_num"]
        return (
            joined(
                latent_attention(f"{prefix}.self_attn.{half}", config)
                | mlp(f"{prefix}.mlps.{half}", config, config["ffn_hidden_size"])
                | {
                    f"{prefix}.{norm}.{half}.weight": (config["hidden_size"],)
                    for norm in ("input_layernorm", "post_attention_layernorm")
                }
                for half in range(2)
            )
            | weights(f"{inner}.router", classifier=(choices, config["hidden_size"]))
            | {f"{inner}.router.e_score_correction_bias": (choices,)}
            | experts(inner, config, count)
        )

    return model(config, layer)


def longcat_ngram(config: Fields) -> Shapes:
    """Add the tables of the last two, three, ... tokens together, each two rows longer than the last."""
    hidden, rows = config["hidden_size"], config["ngram_vocab_size_ratio"] * config["vocab_size"]
    count = config["emb_split_num"] * (config["emb_neighbor_num"] - 1)
    tables = {
        f"model.ngram_embeddings.{kind}.{number}.weight": shape
        for number in range(count)
        for kind, shape in {
            "embedders": (rows + 2 * number + 1, hidden // count),
            "post_projs": (hidden, hidden // count),
        }.items()
    }
    return longcat(config) | tables


def step3(config: Fields, attending: Callable[[str], Shapes], **biases: int) -> Shapes:
    count = config["moe_num_experts"]
    with_experts = [int(number) for number in config["moe_layers_enum"].split(",")]

    def layer(prefix: str, number: int) -> Shapes:
        if number in with_experts:
            rest = (
                weights(f"{prefix}.moe", gate=(count, config["hidden_size"]))
                | {f"{prefix}.moe.{name}": (size,) for name, size in biases.items()}
                | mlp(f"{prefix}.moe", config, config["moe_intermediate_size"], count)
                | mlp(f"{prefix}.share_expert", config, config["share_expert_dim"])
            )
        else:
            rest = mlp(f"{prefix}.mlp", config, config["intermediate_size"])
        return norms(prefix, config) | attending(f"{prefix}.self_attn") | rest

    return model(config, layer)


def step3_text(config: Fields) -> Shapes:
    hidden, size, queries = config["hidden_size"], config["head_dim"], config["share_q_dim"]
    heads = config["num_attention_heads"]
    return step3(
        config,
        lambda prefix: weights(
            prefix,
            q_proj=(queries, hidden),
            k_proj=(size, hidden),
            v_proj=(size, hidden),
            inter_norm=(queries,),
            wq=(heads * size, queries),
            o_proj=(hidden, heads * size),
        ),
    )


def step3p5(config: Fields) -> Shapes:
    def gated(prefix: str) -> Shapes:
        size, hidden = config["head_dim"], config["hidden_size"]
        return attention(prefix, config, "num_attention_groups") | weights(
            prefix,
            q_norm=(size,),
            k_norm=(size,),
            g_proj=(config["num_attention_heads"], hidden),
        )

    return step3(config, gated, router_bias=config["moe_num_experts"])


def ernie_vl(config: Fields) -> Shapes:
    """List the language model: experts for text in a layer, and as many others for images."""
    hidden, (count, others) = config["hidden_size"], config["moe_num_experts"]
    widths = [config["moe_intermediate_size"][expert >= count] for expert in range(count + others)]

    def layer(prefix: str, number: int) -> Shapes:
        inner = f"{prefix}.mlp"
        if number < min(config["moe_layer_start_index"]):
            rest = mlp(inner, config, config["intermediate_size"])
        else:
            rest = (
                {
                    f"{inner}.gate.weight": (hidden, count),
                    f"{inner}.gate.weight_1": (hidden, others),
                }
                | {f"{inner}.moe_statics.e_score_correction_bias": (2, count)}
                | mlp(f"{inner}.shared_experts", config, widths[0])
                | joined(
                    mlp(f"{inner}.experts.{expert}", config, width)
                    for expert, width in enumerate(widths)
                )
            )
        return norms(prefix, config) | attention(f"{prefix}.self_attn", config) | rest

    return model(config, layer)


def kimi_linear(config: Fields) -> Shapes:
    """List delta attention in some layers, and experts whose matrices are called by numbers."""
    hidden, count, linear = (
        config["hidden_size"],
        config["num_experts"],
        config["linear_attn_config"],
    )
    size, heads = linear["head_dim"], linear["num_heads"]
    width = config["moe_intermediate_size"]
    sizes = heads, size, linear["short_conv_kernel_size"]

    def with_experts(prefix: str) -> Shapes:
        up, down = (width, hidden), (hidden, width)
        return (
            weights(prefix, gate=(count, hidden))
            | {f"{prefix}.gate.e_score_correction_bias": (count,)}
            | joined(
                weights(f"{prefix}.experts.{expert}", w1=up, w2=down, w3=up)
                for expert in range(count)
            )
            | mlp(f"{prefix}.shared_experts", config, width)
        )

    def layer(prefix: str, number: int) -> Shapes:
        inner, dense = f"{prefix}.self_attn", number < config["first_k_dense_replace"]
        counted_from_one = number + 1 in linear["kda_layers"]
        return (
            norms(prefix, config)
            | (
                delta_attention(inner, hidden, *sizes)
                if counted_from_one
                else latent_attention(inner, config)
            )
            | (
                mlp(f"{prefix}.mlp", config, config["intermediate_size"])
                if dense
                else with_experts(f"{prefix}.block_sparse_moe")
            )
        )

    return model(config, layer)


def nemotron_h(config: Fields) -> Shapes:
    """List a model of state-space layers, attentions, and experts that have no gate."""
    hidden, vocabulary, count = (
        config[name] for name in ("hidden_size", "vocab_size", "n_routed_experts")
    )

    def ungated(prefix: str, width: int) -> Shapes:
        return weights(prefix, up_proj=(width, hidden), down_proj=(hidden, width))

    def state_space(prefix: str) -> Shapes:
        heads, state = config["mamba_num_heads"], config["n_groups"] * config["ssm_state_size"]
        inner = heads * config["mamba_head_dim"]
        mixed = inner + 2 * state
        return {f"{prefix}.{name}": (heads,) for name in ("A_log", "D", "dt_bias")} | {
            f"{prefix}.conv1d.weight": (mixed, 1, 4),
            f"{prefix}.conv1d.bias": (mixed,),
            f"{prefix}.in_proj.weight": (inner + mixed + heads, hidden),
            f"{prefix}.norm.weight": (inner,),
            f"{prefix}.out_proj.weight": (hidden, inner),
        }

    def with_experts(prefix: str) -> Shapes:
        shared = config["moe_shared_expert_intermediate_size"]
        return (
            weights(prefix, gate=(count, hidden))
            | {f"{prefix}.gate.e_score_correction_bias": (count,)}
            | joined(
                ungated(f"{prefix}.experts.{expert}", config["moe_intermediate_size"])
                for expert in range(count)
            )
            | ungated(f"{prefix}.shared_experts", shared)
        )

    kinds: dict[str, Callable[[str], Shapes]] = {
        "mamba": state_space,
        "attention": lambda prefix: attention(prefix, config),
        "moe": with_experts,
    }
    under = "language_model.backbone"
    ends = {
        f"{under}.embeddings.weight": (vocabulary, hidden),
        f"{under}.norm_f.weight": (hidden,),
        "language_model.lm_head.weight": (vocabulary, hidden),
    }
    return ends | joined(
        weights(f"{under}.layers.{number}", norm=(hidden,))
        | kinds[kind](f"{under}.layers.{number}.mixer")
        for number, kind in enumerate(config["layers_block_type"])
    )


def mistral_large(config: Fields) -> Shapes:
    """List Mistral's own names."""
    hidden, heads, experts = config["dim"], config["n_heads"], config["moe"]
    middle, rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = (config[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v"))

    def gated(prefix: str, width: int) -> Shapes:
        return weights(prefix, w1=(width, hidden), w2=(hidden, width), w3=(width, hidden))

    def layer(prefix: str, number: int) -> Shapes:
        attending = weights(
            f"{prefix}.attention",
            wq_a=(middle, hidden),
            q_a_norm=(middle,),
            wq_b=(heads * (nope + rope), middle),
            wkv_a_with_mqa=(rank + rope, hidden),
            kv_a_norm=(rank,),
            wkv_b=(heads * (nope + value), rank),
            wo=(hidden, heads * value),
        )
        shape = weights(prefix, attention_norm=(hidden,), ffn_norm=(hidden,)) | attending
        if number < experts["first_k_dense_replace"]:
            return shape | gated(f"{prefix}.feed_forward", config["hidden_dim"])
        count, width = experts["num_experts"], experts["expert_hidden_dim"]
        names = (*(f"experts.{expert}" for expert in range(count)), "shared_experts")
        return (
            shape
            | weights(prefix, gate=(count, hidden))
            | joined(gated(f"{prefix}.{name}", width) for name in names)
        )

    ends = dict.fromkeys(("tok_embeddings", "output"), (config["vocab_size"], hidden))
    layers = (layer(f"layers.{number}", number) for number in range(config["n_layers"]))
    named = {f"{name}.weight": shape for name, shape in ends.items()}
    return named | {"norm.weight": (hidden,)} | joined(layers)

"""Names and shapes of the tensors of families whose layers are like Llama's."""

from gpu_checks.published.parts import (
    attention,
    feed_forward,
    gated_delta_net,
    joined,
    latent_attention,
    mlp,
    model,
    normed_attention,
    norms,
    packed_attention,
    routed,
    weights,
)
from gpu_checks.published.writing import Fields, Shapes


def bailing(config: Fields) -> Shapes:
    count = config["num_experts"]
    bias = "gate.expert_bias" if config.get("moe_router_enable_expert_bias") else ""

    def layer(prefix: str, number: int) -> Shapes:
        dense = number < config["first_k_dense_replace"]
        return (
            norms(prefix, config)
            | bailing_attention(f"{prefix}.attention", config, number)
            | (
                mlp(f"{prefix}.mlp", config, config["intermediate_size"])
                if dense
                else routed(f"{prefix}.mlp", config, count, bias)
            )
        )

    return model(config, layer, "word_embeddings")


def bailing_attention(prefix: str, config: Fields, number: int) -> Shapes:
    size = (config["head_dim"],)
    has_norms = config.get("use_qk_norm")
    inner_norms = weights(prefix, query_layernorm=size, key_layernorm=size) if has_norms else {}
    period = config.get("layer_group_size")
    if not period:
        return packed_attention(prefix, config, "query_key_value", "dense") | inner_norms
    if kernel := config.get("short_conv_kernel_size"):
        return bailing_3_attention(prefix, config, kernel, is_latent=(number + 1) % period == 0)
    if (number + 1) % period == 0:
        latent = latent_attention(prefix, config)
        return latent | {f"{prefix}.dense.weight": latent.pop(f"{prefix}.o_proj.weight")}
    whole, hidden = config["num_attention_heads"] * config["head_dim"], config["hidden_size"]
    gate = weights(prefix, g_proj=(whole, hidden), g_norm=(whole,))
    linear = config | {"num_key_value_heads": config["num_attention_heads"]}
    return packed_attention(prefix, linear, "query_key_value", "dense") | gate | inner_norms


def bailing_3_attention(prefix: str, config: Fields, kernel: int, *, is_latent: bool) -> Shapes:
    if is_latent:
        latent = latent_attention(prefix, config)
        return latent | {f"{prefix}.dense.weight": latent.pop(f"{prefix}.o_proj.weight")}
    heads, size, hidden = (
        config[name] for name in ("num_attention_heads", "head_dim", "hidden_size")
    )
    whole = heads * size
    convolutions = {f"{name}_conv1d": (whole, 1, kernel) for name in "qkv"}
    projections = {f"{name}_proj": (whole, hidden) for name in "qkvfg"}
    ends = {"b_proj": (heads, hidden), "o_norm": (size,), "o_proj": (hidden, whole)}
    decays: Shapes = {f"{prefix}.A_log": (heads,), f"{prefix}.dt_bias": (whole,)}
    return weights(prefix, **convolutions, **projections, **ends) | decays


def deepseek(config: Fields) -> Shapes:
    return model(
        config,
        lambda prefix, number: (
            norms(prefix, config)
            | attention(f"{prefix}.self_attn", config)
            | feed_forward(prefix, number, config, "n_routed_experts")
        ),
    )


def sarvam_mla(config: Fields) -> Shapes:
    return model(
        config,
        lambda prefix, number: (
            norms(prefix, config)
            | latent_attention(f"{prefix}.self_attn", config)
            | feed_forward(prefix, number, config, "num_experts", "gate.e_score_correction_bias")
        ),
    )


def pangu_ultra(config: Fields) -> Shapes:
    return model(
        config,
        lambda prefix, number: (
            norms(prefix, config, "pre_mlp_layernorm", "post_mlp_layernorm")
            | latent_attention(f"{prefix}.self_attn", config)
            | feed_forward(prefix, number, config, "n_routed_experts", "e_score_correction_bias")
        ),
    )


def k2_horizon(config: Fields) -> Shapes:
    """List attentions whose queries and keys have a norm over all heads."""
    size, heads, groups = (
        config[name] for name in ("head_dim", "num_attention_heads", "num_key_value_heads")
    )

    def layer(prefix: str, number: int) -> Shapes:
        inner = f"{prefix}.self_attn"
        dense = number in config["mlp_only_layers"]
        return (
            norms(prefix, config)
            | attention(inner, config)
            | weights(inner, q_norm=(heads * size,), k_norm=(groups * size,))
            | weights(inner, gate_proj=(heads * size, config["hidden_size"]))
            | (
                mlp(f"{prefix}.mlp", config, config["intermediate_size"])
                if dense
                else routed(f"{prefix}.mlp", config, config["num_experts"], "gate.bias")
            )
        )

    return model(config, layer)


def interns1_pro(config: Fields) -> Shapes:
    """List the language model: its rotary embedding has coefficients that were learned."""
    under, learned = "model.language_model", config["rope_parameters"]["num_inv_freq"]
    rotary = (config["num_key_value_heads"], learned, learned)
    layers = model(
        config,
        lambda prefix, number: (
            norms(prefix, config)
            | normed_attention(f"{prefix}.self_attn", config)
            | routed(f"{prefix}.mlp", config, config["num_experts"], shared=0)
        ),
        under=under,
    )
    return layers | {f"{under}.rotary_emb.{name}_coef": rotary for name in ("cos", "sin")}


def interns2_mobius(config: Fields) -> Shapes:
    """List layers with an expert of their own, and banks of experts that layers take in turn."""
    under, hidden, size = "model.language_model", config["hidden_size"], config["head_dim"]
    queries = {"q_proj": (2 * config["num_attention_heads"] * size, hidden)}  # and their gates

    def layer(prefix: str, number: int) -> Shapes:
        inner = f"{prefix}.mlp"
        return (
            norms(prefix, config)
            | (
                gated_delta_net(f"{prefix}.linear_attn", config)
                if config["layer_types"][number] == "linear_attention"
                else normed_attention(f"{prefix}.self_attn", config)
                | weights(f"{prefix}.self_attn", **queries)
            )
            | weights(inner, shared_expert_gate=(1, hidden))
            | mlp(f"{inner}.shared_expert", config, config["shared_expert_intermediate_size"])
        )

    banks = (f"{under}.meta_mlp.{bank}" for bank in range(config["num_blocks"]))
    return model(config, layer, under=under) | joined(
        routed(bank, config, config["num_experts"], shared=0) for bank in banks
    )


def mimo_v2(config: Fields) -> Shapes:
    def layer(prefix: str, number: int) -> Shapes:
        inner = f"{prefix}.mlp"
        return (
            norms(prefix, config)
            | packed_attention(f"{prefix}.self_attn", config, "qkv_proj", "o_proj")
            | (
                routed(
                    inner,
                    config,
                    config["n_routed_experts"],
                    "gate.e_score_correction_bias",
                    shared=0,
                )
                if config["moe_layer_freq"][number]
                else mlp(inner, config, config["intermediate_size"])
            )
        )

    return model(config, layer)

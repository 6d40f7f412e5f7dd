"""Names and shapes of the tensors of families whose attention has an indexer."""

from gpu_checks.published.parts import (
    delta_attention,
    feed_forward,
    indexed_attention,
    joined,
    latent_attention,
    model,
    norms,
    weights,
)
from gpu_checks.published.writing import Fields, Shapes

BIAS = "gate.e_score_correction_bias"


def glm5_next(config: Fields, under: str = "model") -> Shapes:
    """List streams that are mixed, delta attention, and latent attention with an indexer of pools."""
    hidden, streams = config["hidden_size"], config["hc_mult"]

    dense_first = config | {"first_k_dense_replace": config["mlp_layer_types"].count("dense")}

    def mixing(prefix: str) -> Shapes:
        rows = (2 + streams) * streams
        sizes = {"fn": (rows, streams * hidden), "base": (rows,), "scale": (3,)}
        return {f"{prefix}_{name}": shape for name, shape in sizes.items()}

    def pools(prefix: str) -> Shapes:
        size, pool = config["index_head_dim"], config["index_kpool"]
        return {
            f"{prefix}.index_kpool_compress_ape": (pool, size),
            f"{prefix}.index_kpool_compress_gate": (size, hidden),
        }

    def layer(prefix: str, number: int) -> Shapes:
        inner = f"{prefix}.self_attn"
        sizes = (config[f"linear_{name}"] for name in ("num_heads", "head_dim", "conv_kernel_dim"))
        is_linear = config["layer_types"][number] == "linear_attention"
        return (
            norms(prefix, config)
            | mixing(f"{prefix}.hc_attn")
            | mixing(f"{prefix}.hc_ffn")
            | (
                delta_attention(inner, hidden, *sizes)
                if is_linear
                else indexed_attention(inner, config) | pools(f"{inner}.indexer")
            )
            | feed_forward(prefix, number, dense_first, "n_routed_experts", BIAS)
        )

    return model(config, layer, under=under)


def glm5_next_vl(config: Fields) -> Shapes:
    """List the language model of the one that sees."""
    return glm5_next(config, "model.language_model")


def hy_v4(config: Fields) -> Shapes:
    """List streams that are mixed, and latent attention with a gate, sinks, and some indexers."""
    hidden, streams, heads = (
        config[name] for name in ("hidden_size", "hc_mult", "num_attention_heads")
    )
    dense_first = config | {"first_k_dense_replace": config["mlp_layer_types"].count("dense")}

    def mixing(prefix: str, kind: str, rows: int, scales: int) -> Shapes:
        sizes = {"fn": (rows, streams * hidden), "base": (rows,), "scale": (scales,)}
        return {f"{prefix}.{kind}_{name}": shape for name, shape in sizes.items()}

    def layer(prefix: str, number: int) -> Shapes:
        inner, has_indexer = f"{prefix}.self_attn", config["indexer_types"][number] == "full"
        attending = indexed_attention if has_indexer else latent_attention
        return (
            norms(prefix, config)
            | mixing(f"{prefix}.hc_attn_layer.hc_pre", "hc", 2 * streams, 2)
            | mixing(f"{prefix}.hc_mlp_layer.hc_pre", "hc", 2 * streams, 2)
            | attending(inner, config)
            | weights(inner, linear_gate=(heads * config["v_head_dim"], hidden))
            | {f"{inner}.learnable_sink_param": (heads,)}
            | feed_forward(prefix, number, dense_first, "n_routed_experts", BIAS)
        )

    return model(config, layer) | mixing("model.hc_head", "hc_head", streams, 1)


def deepseek_v4(config: Fields) -> Shapes:
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
        inner = weights(prefix, wkv=(rows, hidden), wgate=(rows, hidden), norm=(size,))
        return inner | {f"{prefix}.ape": (ratio, rows)}

    def compressed(prefix: str, ratio: int) -> Shapes:
        heads, size, rank = (
            config[name] for name in ("num_attention_heads", "head_dim", "q_lora_rank")
        )
        groups, out = config["o_groups"], config["o_lora_rank"]
        found = {f"{prefix}.attn_sink": (heads,)} | weights(
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
            found |= weights(
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
        names = (f"experts.{expert}" for expert in range(count))
        return (
            weights(prefix, attn_norm=(hidden,), ffn_norm=(hidden,))
            | mixing(f"{prefix}.hc_attn", (2 + streams) * streams, 3)
            | mixing(f"{prefix}.hc_ffn", (2 + streams) * streams, 3)
            | compressed(f"{prefix}.attn", config["compress_ratios"][number])
            | weights(inner, gate=(count, hidden))
            | (hashed if is_hashed else {f"{inner}.gate.bias": (count,)})
            | joined(weights(f"{inner}.{each}", **gated) for each in (*names, "shared_experts"))
        )

    ends = {"embed.weight": (vocabulary, hidden), "head.weight": (vocabulary, hidden)}
    layers = joined(layer(number) for number in range(config["num_hidden_layers"]))
    return ends | {"norm.weight": (hidden,)} | mixing("hc_head", streams, 1) | layers

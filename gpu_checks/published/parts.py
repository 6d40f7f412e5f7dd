"""Names and shapes of the parts that families share: attentions, feed-forwards, routers, experts."""

from collections.abc import Callable, Iterable

from gpu_checks.published.writing import Fields, Shapes


def joined(parts: Iterable[Shapes]) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}


def weights(prefix: str, **shapes: tuple[int, ...]) -> Shapes:
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


def model(
    config: Fields,
    layer: Callable[[str, int], Shapes],
    embedding: str = "embed_tokens",
    under: str = "model",
) -> Shapes:
    """List a whole model: embeddings, `layer` of every prefix and number, norm and head."""
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    count = config.get("num_layers") or config["num_hidden_layers"]
    layers = (layer(f"{under}.layers.{number}", number) for number in range(count))
    ends = weights(under, **{embedding: (vocabulary, hidden), "norm": (hidden,)})
    return ends | joined(layers) | {"lm_head.weight": (vocabulary, hidden)}


def norms(prefix: str, config: Fields, *others: str) -> Shapes:
    names = ("input_layernorm", "post_attention_layernorm", *others)
    return weights(prefix, **dict.fromkeys(names, (config["hidden_size"],)))


def mlp(prefix: str, config: Fields, width: int, *count: int) -> Shapes:
    """List a gated feed-forward; `count` of them in one tensor if given."""
    up, down = (*count, width, config["hidden_size"]), (*count, config["hidden_size"], width)
    return weights(prefix, gate_proj=up, up_proj=up, down_proj=down)


def experts(prefix: str, config: Fields, count: int) -> Shapes:
    width = config.get("expert_ffn_hidden_size") or config["moe_intermediate_size"]
    return joined(mlp(f"{prefix}.experts.{expert}", config, width) for expert in range(count))


def routed(prefix: str, config: Fields, count: int, bias: str = "", shared: int = 1) -> Shapes:
    """List a router, with the `bias` of its choice if named, routed experts and shared ones."""
    router = weights(prefix, gate=(count, config["hidden_size"]))
    biases: Shapes = {f"{prefix}.{bias}": (count,)} if bias else {}
    width = config["moe_intermediate_size"] * shared
    besides = mlp(f"{prefix}.shared_experts", config, width) if shared else {}
    return router | biases | experts(prefix, config, count) | besides


def latent_attention(prefix: str, config: Fields) -> Shapes:
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
    return weights(
        prefix,
        **queries,
        kv_a_proj_with_mqa=(rank + rope, hidden),
        kv_a_layernorm=(rank,),
        kv_b_proj=(heads * (nope + value), rank),
        o_proj=(hidden, heads * value),
    )


def indexed_attention(prefix: str, config: Fields) -> Shapes:
    """List a latent attention that sees the tokens which its indexer chooses."""
    size, heads, hidden = (
        config[name] for name in ("index_head_dim", "index_n_heads", "hidden_size")
    )
    indexer = weights(
        f"{prefix}.indexer",
        wq_b=(heads * size, config["q_lora_rank"]),
        wk=(size, hidden),
        weights_proj=(heads, hidden),
        k_norm=(size,),
    )
    bias: Shapes = {f"{prefix}.indexer.k_norm.bias": (size,)}
    return latent_attention(prefix, config) | indexer | bias


def delta_attention(prefix: str, hidden: int, heads: int, size: int, kernel: int) -> Shapes:
    whole = heads * size
    each = joined(
        weights(prefix, **{f"{name}_proj": (whole, hidden), f"{name}_conv1d": (whole, 1, kernel)})
        for name in "qkv"
    )
    gates = joined(
        weights(prefix, **{f"{name}_a_proj": (size, hidden), f"{name}_b_proj": (whole, size)})
        for name in "fg"
    )
    others = weights(prefix, b_proj=(heads, hidden), o_norm=(size,), o_proj=(hidden, whole))
    decays: Shapes = {f"{prefix}.A_log": (1, 1, heads, 1), f"{prefix}.dt_bias": (whole,)}
    return each | gates | others | decays


def attention(prefix: str, config: Fields, groups: str = "num_key_value_heads") -> Shapes:
    hidden, size = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config[groups] * size
    return weights(
        prefix,
        q_proj=(queries, hidden),
        k_proj=(keys, hidden),
        v_proj=(keys, hidden),
        o_proj=(hidden, queries),
    )


def normed_attention(prefix: str, config: Fields) -> Shapes:
    """List one whose queries and keys are normalised, head by head."""
    size = (config["head_dim"],)
    return attention(prefix, config) | weights(prefix, q_norm=size, k_norm=size)


def gated_delta_net(prefix: str, config: Fields) -> Shapes:
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    size, kernel = config["linear_value_head_dim"], config["linear_conv_kernel_dim"]
    values, gates = heads * size, ("A_log", "dt_bias")
    return {f"{prefix}.{name}": (heads,) for name in gates} | weights(
        prefix,
        in_proj_qkv=(2 * keys + values, hidden),
        in_proj_z=(values, hidden),
        in_proj_b=(heads, hidden),
        in_proj_a=(heads, hidden),
        conv1d=(2 * keys + values, 1, kernel),
        norm=(size,),
        out_proj=(hidden, values),
    )


def packed_attention(prefix: str, config: Fields, packed: str, out: str) -> Shapes:
    """List an attention whose queries, keys and values come from one matrix."""
    hidden, size = config["hidden_size"], config["head_dim"]
    queries, keys = (
        config["num_attention_heads"] * size,
        2 * config["num_key_value_heads"] * size,
    )
    return weights(prefix, **{packed: (queries + keys, hidden), out: (hidden, queries)})


def feed_forward(prefix: str, number: int, config: Fields, experts: str, bias: str = "") -> Shapes:
    """List a dense feed-forward in the first layers, experts in the others."""
    if number < config["first_k_dense_replace"]:
        return mlp(f"{prefix}.mlp", config, config["intermediate_size"])
    return routed(f"{prefix}.mlp", config, config[experts], bias)

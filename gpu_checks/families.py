"""Small configs of the MoE families that transformers has, with a layer of each kind that a family has.

Hybrids have a layer with a state beside one with keys and values, families with windows one of either.
"""

from collections.abc import Callable
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vllm_dwdp.entrypoints.bench.checkpoints import COMMON, qwen3_moe

Builder = Callable[[int], transformers.PretrainedConfig]

HEADS = COMMON | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
DERIVED = {key: value for key, value in HEADS.items() if key != "head_dim"}
"""`HEADS` for families whose heads have the size that the hidden size gives them."""
EXPERTS = {"intermediate_size": 160, "moe_intermediate_size": 96, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""Multi-head latent attention, of the sizes that vLLM's kernels on CPUs have."""
MLA = DERIVED | LATENT | {"n_shared_experts": 1, "n_group": 1, "topk_group": 1}
BIASED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
INDEXER = {"index_topk": 64, "index_head_dim": 128, "index_n_heads": 4}
GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
LINEAR_THEN_FULL = ["linear_attention", "linear_attention", "full_attention"]
SLIDING_THEN_FULL = ["sliding_attention", "sliding_attention", "full_attention"]
DENSE_THEN_SPARSE = ["dense", "sparse", "sparse"]


def of(model_type: str, experts: str, **fields: Any) -> Builder:
    """Describe a family whose config counts the experts in the field `experts`."""
    return lambda count: CONFIG_MAPPING[model_type](**fields | {experts: count})


QWEN3_VL_TEXT = of(
    "qwen3_vl_moe_text",
    "num_experts",
    **HEADS | EXPERTS,
    norm_topk_prob=True,
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
)
QWEN3_5_TEXT = of(
    "qwen3_5_moe_text",
    "num_experts",
    **HEADS | EXPERTS | GATED_DELTA | {"head_dim": 64},
    shared_expert_intermediate_size=96,
    layer_types=LINEAR_THEN_FULL,
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
)


def _jamba_classifier(num_experts: int) -> transformers.PretrainedConfig:
    config = FAMILIES["jamba"](num_experts)
    config.architectures = ["JambaForSequenceClassification"]
    config.num_labels = 3
    return config


def _privacy_filter(num_experts: int) -> transformers.PretrainedConfig:
    config = of(
        "openai_privacy_filter",
        "num_local_experts",
        **HEADS | {"intermediate_size": 96, "num_experts_per_tok": 2},
        sliding_window=64,
    )(num_experts)
    config.architectures = ["OpenAIPrivacyFilterForTokenClassification"]
    config.num_labels = 33
    return config


def _qwen3_moe_classifier(num_experts: int) -> transformers.PretrainedConfig:
    config = qwen3_moe(num_experts)
    config.architectures = ["Qwen3MoeForSequenceClassification"]
    config.num_labels = 3
    return config


FAMILIES: dict[str, Builder] = {
    "afmoe": of(
        "afmoe",
        "num_experts",
        **HEADS | EXPERTS,
        layer_types=SLIDING_THEN_FULL,
        sliding_window=64,
        num_shared_experts=1,
        score_func="sigmoid",
        route_norm=True,
        n_group=1,
        topk_group=1,
    ),
    "axk1": of("axk1", "n_routed_experts", **MLA | EXPERTS, first_k_dense_replace=0),
    "cohere2_moe": of(
        "cohere2_moe",
        "num_experts",
        **HEADS | EXPERTS | {"tie_word_embeddings": True, "intermediate_size": 96},
        layer_types=SLIDING_THEN_FULL,
        sliding_window=64,
        prefix_dense_intermediate_size=160,
        mlp_layer_types=DENSE_THEN_SPARSE,
        first_k_dense_replace=1,
    ),
    "deepseek_v32": of(
        "deepseek_v32",
        "n_routed_experts",
        **MLA | EXPERTS | INDEXER | BIASED,
        mlp_layer_types=DENSE_THEN_SPARSE,
        first_k_dense_replace=1,
    ),
    "ernie4_5_moe": of(
        "ernie4_5_moe",
        "moe_num_experts",
        **DERIVED | EXPERTS,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_end_index=2,
    ),
    "exaone_moe": of(
        "exaone_moe",
        "num_experts",
        **HEADS | EXPERTS,
        layer_types=SLIDING_THEN_FULL,
        sliding_window=64,
        mlp_layer_types=DENSE_THEN_SPARSE,
    ),
    "gemma4": of(
        "gemma4_text",
        "num_experts",
        **HEADS | EXPERTS | {"tie_word_embeddings": True},
        top_k_experts=2,
        enable_moe_block=True,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=512,
        layer_types=SLIDING_THEN_FULL,
        sliding_window=64,
        per_layer_config={},
    ),
    "gemma4_shared_kv": of(
        "gemma4_text",
        "num_experts",
        **HEADS | EXPERTS | {"tie_word_embeddings": True, "num_hidden_layers": 4},
        top_k_experts=2,
        enable_moe_block=True,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=512,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        sliding_window=64,
        per_layer_config={},
    ),
    "glm4_moe_lite": of(
        "glm4_moe_lite",
        "n_routed_experts",
        **MLA | EXPERTS,
        mlp_layer_types=DENSE_THEN_SPARSE,
        first_k_dense_replace=1,
    ),
    "glm_moe_dsa": of(
        "glm_moe_dsa",
        "n_routed_experts",
        **MLA | EXPERTS | INDEXER | BIASED,
        mlp_layer_types=DENSE_THEN_SPARSE,
        first_k_dense_replace=1,
    ),
    "granite_moe_hybrid": of(
        "granitemoehybrid",
        "num_local_experts",
        **DERIVED | {"intermediate_size": 96, "num_experts_per_tok": 2},
        shared_intermediate_size=96,
        layer_types=LINEAR_THEN_FULL,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=32,
        position_embedding_type="nope",
        attention_multiplier=0.2,
    ),
    "granite_moe_shared": of(
        "granitemoeshared",
        "num_local_experts",
        **DERIVED | {"intermediate_size": 96, "num_experts_per_tok": 2},
        shared_intermediate_size=96,
        attention_multiplier=0.2,
    ),
    "granite_moe_swa": of(
        "granitemoe_swa",
        "num_local_experts",
        **DERIVED | {"intermediate_size": 96, "num_experts_per_tok": 2},
        shared_intermediate_size=96,
        layer_types=SLIDING_THEN_FULL,
        layer_rope_theta=[10000.0, 10000.0, 0.0],
        sliding_window=64,
        attention_multiplier=0.2,
    ),
    "hy_v3": of(
        "hy_v3",
        "num_experts",
        **HEADS | EXPERTS,
        mlp_layer_types=DENSE_THEN_SPARSE,
        num_shared_experts=1,
        first_k_dense_replace=1,
        expert_hidden_dim=96,
        route_norm=True,
        qk_norm=True,
    ),
    "jamba": of(
        "jamba",
        "num_experts",
        **DERIVED | {"intermediate_size": 96, "num_experts_per_tok": 2, "num_hidden_layers": 4},
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=16,
        mamba_dt_rank=8,
    ),
    "kimi_k2": of(
        "deepseek_v3",
        "n_routed_experts",
        **MLA | EXPERTS | BIASED,
        first_k_dense_replace=1,
    ),
    "lfm2_moe": of(
        "lfm2_moe",
        "num_experts",
        **DERIVED | EXPERTS | {"tie_word_embeddings": True},
        num_dense_layers=1,
        layer_types=["conv", "conv", "full_attention"],
    ),
    "laguna": of(
        "laguna",
        "num_experts",
        **HEADS | EXPERTS,
        shared_expert_intermediate_size=96,
        layer_types=SLIDING_THEN_FULL,
        mlp_layer_types=DENSE_THEN_SPARSE,
        num_attention_heads_per_layer=[4, 4, 4],
        sliding_window=64,
    ),
    "llama4_text": of(
        "llama4_text",
        "num_local_experts",
        **HEADS | {"intermediate_size": 96, "intermediate_size_mlp": 160, "num_experts_per_tok": 1},
        interleave_moe_layer_step=1,
        layer_types=["chunked_attention", "chunked_attention", "full_attention"],
        no_rope_layers=[1, 1, 0],
        attention_chunk_size=128,
    ),
    "mellum": of(
        "mellum",
        "num_local_experts",
        **HEADS | EXPERTS,
        layer_types=SLIDING_THEN_FULL,
        sliding_window=64,
    ),
    "minimax_m2": of(
        "minimax_m2",
        "num_local_experts",
        **HEADS | {"intermediate_size": 96, "num_experts_per_tok": 2},
        rotary_dim=16,
        use_qk_norm=True,
        scoring_func="sigmoid",
        use_routing_bias=True,
    ),
    "mimo_v2_flash": of(
        "mimo_v2_flash",
        "n_routed_experts",
        **HEADS | EXPERTS,
        v_head_dim=32,
        layer_types=SLIDING_THEN_FULL,
        mlp_layer_types=DENSE_THEN_SPARSE,
        sliding_window=64,
        n_group=1,
        topk_group=1,
        hybrid_layer_pattern=[1, 1, 0],
        moe_layer_freq=[0, 1, 1],
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=32,
        swa_v_head_dim=32,
        sliding_window_size=64,
        layernorm_epsilon=1e-5,
    ),
    "nemotron_h": of(
        "nemotron_h",
        "n_routed_experts",
        **{key: value for key, value in HEADS.items() if key != "num_hidden_layers"} | EXPERTS,
        layers_block_type=["mamba", "moe", "attention", "moe"],
        ssm_state_size=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        n_groups=1,
        moe_shared_expert_intermediate_size=96,
    ),
    "phimoe": of(
        "phimoe",
        "num_local_experts",
        **DERIVED | {"intermediate_size": 96, "num_experts_per_tok": 2},
        attention_bias=True,
        lm_head_bias=True,
    ),
    "qwen3_next": of(
        "qwen3_next",
        "num_experts",
        **HEADS | EXPERTS | GATED_DELTA | {"head_dim": 64},
        shared_expert_intermediate_size=96,
        layer_types=LINEAR_THEN_FULL,
    ),
    "flex_olmo": of(
        "flex_olmo",
        "num_experts",
        **DERIVED | {"intermediate_size": 96, "num_experts_per_tok": 2},
    ),
    "hunyuan_v1_moe": of(
        "hunyuan_v1_moe",
        "num_experts",
        **HEADS | {"intermediate_size": 96},
        moe_topk=2,
    ),
    "minimax_m3": of(
        "minimax_m3_vl_text",
        "num_local_experts",
        **HEADS | {"intermediate_size": 96, "num_experts_per_tok": 2},
        index_head_dim=0,  # vLLM's Transformers back end has no sparse attention, nor its keys
    ),
    "jamba_classifier": _jamba_classifier,
    "privacy_filter": _privacy_filter,
    "qwen3_moe_classifier": _qwen3_moe_classifier,
    "qwen3_5_moe_text": QWEN3_5_TEXT,
}

"""Fields of configs that several families, or a family and one around it, have."""

from gpu_checks.families import GATED_DELTA, INDEXER, LATENT, LINEAR_THEN_FULL
from gpu_checks.published.writing import GROUPED, Fields

GATED_TEXT: Fields = GATED_DELTA | {
    "linear_conv_kernel_dim": 4,
    "head_dim": 64,
    "shared_expert_intermediate_size": 96,
    "layer_types": LINEAR_THEN_FULL,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
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

LONGCAT: Fields = LATENT | {
    "num_layers": 2,
    "ffn_hidden_size": 160,
    "expert_ffn_hidden_size": 96,
    "moe_topk": 3,
    "zero_expert_num": 4,
    "zero_expert_type": "identity",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "routed_scaling_factor": 1.5,
}
WITHOUT_LONGCAT = (
    "head_dim",
    "num_hidden_layers",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts_per_tok",
)
GLM5_NEXT: Fields = (
    LATENT
    | INDEXER
    | {
        "mhc": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "mla_use_nope": True,
        "indexer_rope_interleave": True,
        "num_nextn_predict_layers": 0,
        "qk_rope_head_dim": 0,
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "linear_head_dim": 128,
        "linear_num_heads": 2,
        "linear_conv_kernel_dim": 4,
        "hc_mult": 4,
        "index_kpool": 8,
    }
)
INKLING: Fields = {"n_shared_experts": 1, "shared_expert_sink": True, "use_sconv": True}
INKLING_TOKENS = (
    *(f"<|message_{role}|>" for role in ("user", "model", "system", "tool")),
    *(f"<|content_{kind}|>" for kind in ("text", "image", "model_end_sampling", "thinking")),
    *(f"<|content_{kind}|>" for kind in ("audio_input", "xml", "invoke_tool_json")),
    "<|end_message|>",
    "<|audio_end|>",
)
MINIMAX_M3: Fields = {
    "intermediate_size": 96,
    "dense_intermediate_size": 160,
    "shared_intermediate_size": 96,
    "n_shared_experts": 1,
    "head_dim": 128,
    "use_gemma_norm": True,
    "attention_output_gate": False,
    "rotary_dim": 64,
    "partial_rotary_factor": 0.5,
    "hidden_act": "swigluoai",
    "swiglu_alpha": 1.702,
    "swiglu_beta": 1.0,
    "swiglu_limit": 7.0,
    "use_qk_norm": True,
    "qk_norm_type": "per_head",
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "routed_scaling_factor": 2.0,
    "moe_layer_freq": [0, 1, 1],
    "sparse_attention_config": {
        "use_sparse_attention": True,
        "sparse_index_dim": 128,
        "sparse_num_index_heads": 2,
        "sparse_topk_blocks": 16,
        "sparse_block_size": 128,
        "sparse_disable_index_value": [0, 1, 1],
        "sparse_score_type": "max",
        "sparse_init_block": 0,
        "sparse_local_block": 1,
        "sparse_attention_freq": [0, 1, 1],
    },
}
MISTRAL: Fields = {
    "dim": 128,
    "n_layers": 3,
    "head_dim": 192,
    "hidden_dim": 160,
    "n_heads": 4,
    "n_kv_heads": 4,
    "norm_eps": 1e-5,
    "vocab_size": 512,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "expert_hidden_dim": 96,
        "first_k_dense_replace": 1,
        "route_every_n": 1,
        "routed_scale": 1.0,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
    },
    "llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1},
}
K2_HORIZON: Fields = {
    "attention_bias": False,
    "attention_gate_func": "silu",
    "decoder_sparse_step": 1,
    "layernorm_num_groups": 2,
    "mlp_only_layers": [0],
    "moe_gate_bias": True,
    "mova_num_experts": 0,
    "mova_num_experts_per_tok": 0,
    "norm_topk_prob": True,
    "num_shared_experts": 1,
    "query_key_norm": True,
    "rope_head_dim": 16,
    "router_scaling_factor": 1.5,
    "router_score_func": "sigmoid",
}

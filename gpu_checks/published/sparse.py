"""Families that generate from text with sparse attention."""

from gpu_checks.families import INDEXER, LATENT
from gpu_checks.published import indexed
from gpu_checks.published.fields import (
    GLM5_NEXT,
    MINIMAX_M3,
)
from gpu_checks.published.writing import GROUPED, Published

SPARSE: dict[str, Published] = {
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
        tensors=indexed.deepseek_v4,
        has_own_configuration=False,
        without=("intermediate_size",),  # transformers' name for that of experts
    ),
    "glm5_next_text": Published(
        architecture="Glm5NextForCausalLM",
        model_type="glm5_next_text",
        experts="n_routed_experts",
        fields=GLM5_NEXT,
        tensors=indexed.glm5_next,
        without=("head_dim",),
        has_own_configuration=False,
    ),
    "hy_v4": Published(
        architecture="HYV4ForCausalLM",
        model_type="hy_v4",
        experts="n_routed_experts",
        fields=LATENT
        | INDEXER
        | GROUPED
        | {
            "hc_mult": 4,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "layer_types": ["indexed_attention"] * 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "indexer_types": ["full", "full", "shared"],
        },
        tensors=indexed.hy_v4,
        without=("head_dim",),
        has_own_configuration=False,
    ),
    "minimax_m3_sparse": Published(
        architecture="MiniMaxM3SparseForCausalLM",
        model_type="minimax_m3_text",
        experts="num_local_experts",
        fields=MINIMAX_M3,
        without=("moe_intermediate_size",),
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
"""By name."""

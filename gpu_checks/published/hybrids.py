"""Families that generate from text, of layers of more than one kind."""

from gpu_checks.families import LATENT
from gpu_checks.published import layouts, own_names
from gpu_checks.published.fields import (
    BAILING_V2,
    GATED_TEXT,
    INKLING,
    INKLING_TOKENS,
)
from gpu_checks.published.writing import Published

HYBRIDS: dict[str, Published] = {
    "bailing_moe_v2_5": Published(
        architecture="BailingMoeV2_5ForCausalLM",
        model_type="bailing_hybrid",
        experts="num_experts",
        fields=BAILING_V2 | LATENT | {"layer_group_size": 3, "head_dim": 32, "group_norm_size": 4},
        tensors=layouts.bailing,
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
        tensors=own_names.kimi_linear,
        has_own_configuration=False,
    ),
    "bailing_moe_v3": Published(
        architecture="BailingMoeV3ForCausalLM",
        model_type="bailing_hybrid",
        experts="num_experts",
        fields=BAILING_V2
        | LATENT
        | {
            "q_lora_rank": None,
            "layer_group_size": 3,
            "short_conv_kernel_size": 4,
            "no_kda_lora": True,
            "moe_shared_expert_intermediate_size": 96,
            "rope_interleave": True,
        },
        tensors=layouts.bailing,
    ),
    "qwen4_exp_text": Published(
        architecture="Qwen4ExpForCausalLM",
        model_type="qwen4_exp_text",
        experts="num_experts",
        fields=GATED_TEXT | {"hc_lowrank": 32, "output_gate_type": "silu"},
        has_own_configuration=False,
    ),
    "inkling_text": Published(
        architecture="InklingForCausalLM",
        model_type="inkling_model",
        experts="n_routed_experts",
        fields=INKLING,
        tokens=INKLING_TOKENS,
        has_own_configuration=False,
    ),
}
"""By name."""

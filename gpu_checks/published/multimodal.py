"""Families whose text model is one part of them. Towers have no weights: they are asked with text."""

import json

from gpu_checks.families import LATENT, LINEAR_THEN_FULL
from gpu_checks.multimodal import VISION
from gpu_checks.published import indexed, layouts, own_names
from gpu_checks.published.families import TEXT
from gpu_checks.published.fields import GATED_TEXT, GLM5_NEXT, INKLING, INKLING_TOKENS, MINIMAX_M3
from gpu_checks.published.writing import GROUPED, Fields, Published

PICTURES: Fields = {
    "patch_size": 14,
    "merge_kernel_size": 2,
    "temporal_merge_kernel_size": 4,
    "in_patch_limit": 64,
    "in_patch_limit_each_frame": 64,
    "in_patch_limit_video": 64,
    "patch_limit_on_one_side": 64,
    "fixed_output_tokens": None,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
"""How Kimi prepares pictures."""
IMAGE_IDS: Fields = {
    "image_token_id": 496,
    "video_token_id": 497,
    "vision_start_token_id": 494,
    "vision_end_token_id": 495,
}
TOWER: Fields = VISION | {
    "patch_size": 16,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "deepstack_visual_indexes": [],
}

MULTIMODAL: dict[str, Published] = {
    "bailing_moe_v3_vl": Published(
        architecture="BailingMoeV3VLForConditionalGeneration",
        model_type="bailing_moe_v3_vl",
        experts="num_experts",
        fields=LATENT
        | GROUPED
        | {
            "layer_group_size": 3,
            "moe_shared_expert_intermediate_size": 96,
            "rope_interleave": True,
            "no_kda_lora": True,
            "short_conv_kernel_size": 4,
        },
        inside="text_config",
        besides={"vision_config": TOWER} | IMAGE_IDS,
        has_own_configuration=False,
    ),
    "interns1_pro": Published(
        architecture="InternS1ProForConditionalGeneration",
        model_type="interns1_pro",
        experts="num_experts",
        fields={
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "router_n_groups": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "fope_init_factor": 0.5,
                "fope_sep_head": True,
                "num_inv_freq": 8,
            },
        },
        tensors=layouts.interns1_pro,
        without=("rope_theta",),
        inside="text_config",
        besides={"vision_config": TOWER} | IMAGE_IDS,
    ),
    "interns2_mobius": Published(
        architecture="InternS2MobiusForConditionalGeneration",
        model_type="interns2_mobius",
        experts="num_experts",
        fields=GATED_TEXT
        | {
            "model_type": "qwen3_5_moe_text",
            "layer_types": [*LINEAR_THEN_FULL, "linear_attention", "full_attention"],
            "num_blocks": 3,
            "num_hidden_layers": 5,
        },
        tensors=layouts.interns2_mobius,
        inside="text_config",
        besides={"vision_config": TOWER} | IMAGE_IDS,
    ),
    "kimi_k3": Published(
        architecture="KimiK3ForConditionalGeneration",
        model_type="kimi_k3",
        experts="num_experts",
        fields=LATENT
        | {
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "linear_attn_config": {
                "kda_layers": [1, 2],
                "full_attn_layers": [3],
                "num_heads": 2,
                "head_dim": 128,
                "short_conv_kernel_size": 4,
            },
        },
        inside="text_config",
        besides={
            "vision_config": {
                "vt_hidden_size": 64,
                "vt_intermediate_size": 96,
                "vt_num_attention_heads": 2,
                "vt_num_hidden_layers": 1,
                "qkv_hidden_size": 64,
            },
            "media_placeholder_token_id": 494,
        },
        files={"preprocessor_config.json": json.dumps({"media_proc_cfg": PICTURES})},
        has_own_configuration=False,
    ),
    "glm5_next": Published(
        architecture="Glm5NextForConditionalGeneration",
        model_type="glm5_next",
        experts="n_routed_experts",
        fields=GLM5_NEXT,
        tensors=indexed.glm5_next_vl,
        without=("head_dim",),
        inside="text_config",
        besides={"vision_config": TOWER} | IMAGE_IDS,
        has_own_configuration=False,
    ),
    "qwen4_exp": Published(
        architecture="Qwen4ExpForConditionalGeneration",
        model_type="qwen4_exp",
        experts="num_experts",
        fields=GATED_TEXT | {"hc_lowrank": 32, "output_gate_type": "silu"},
        inside="text_config",
        besides={"vision_config": TOWER} | IMAGE_IDS,
        has_own_configuration=False,
    ),
    "inkling": Published(
        architecture="InklingForConditionalGeneration",
        model_type="inkling_mm_model",
        experts="n_routed_experts",
        fields=INKLING,
        inside="text_config",
        tokens=INKLING_TOKENS,
        has_own_configuration=False,
    ),
    "deepseek_v41": Published(
        architecture="DeepseekV41ForCausalLM",
        model_type="deepseek_v41",
        experts="n_routed_experts",
        fields=TEXT["deepseek_v4"].fields,
        inside="text_config",
        has_own_configuration=False,
    ),
    "nemotron_h_omni": Published(
        architecture="NemotronH_Omni_Reasoning_V3",
        model_type="NemotronH_Nano_VL_V2",
        experts="n_routed_experts",
        fields={
            "model_type": "nemotron_h",
            "mlp_hidden_act": "relu2",
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "ssm_state_size": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "moe_shared_expert_intermediate_size": 96,
        },
        tensors=own_names.nemotron_h,
        without=("num_hidden_layers",),
        inside="llm_config",
        besides={
            "vision_config": {
                "video_temporal_patch_size": 2,
                "args": {"model": "vit_small_patch16_224"},
            },
            "force_image_size": 64,
            "patch_size": 16,
            "template": "",
            "ps_version": "v2",
            "image_tag_type": "internvl",
            "vit_hidden_size": 64,
            "projector_hidden_size": 64,
            "downsample_ratio": 0.5,
            "img_context_token_id": 494,
            "norm_mean": [0.5, 0.5, 0.5],
            "norm_std": [0.5, 0.5, 0.5],
        },
    ),
    "mimo_v2_omni": Published(
        architecture="MiMoV2OmniForCausalLM",
        model_type="mimo_v2_omni",
        experts="n_routed_experts",
        fields=TEXT["mimo_v2"].fields,
        tensors=TEXT["mimo_v2"].tensors,
        besides={
            "vision_config": {
                "depth": 1,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_heads": 2,
                "num_key_value_heads": 2,
                "num_query_groups": 1,
                "kv_channels": 32,
                "qk_channels": 32,
                "out_hidden_size": 128,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "tokens_per_second": 2,
                "in_channels": 3,
                "hidden_act": "silu",
                "window_size": 128,
                "fullatt_block_indexes": [0],
                "visual_token_window_size": 64,
                "vit_window_attn_types": [-1],
                "use_sink": False,
            },
            "processor_config": {},
        },
    ),
    "minimax_m3_vl": Published(
        architecture="MiniMaxM3SparseForConditionalGeneration",
        model_type="minimax_m3_vl",
        experts="num_local_experts",
        fields=MINIMAX_M3,
        without=("moe_intermediate_size",),
        inside="text_config",
        besides={
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 56,
                "num_channels": 3,
                "layer_norm_eps": 1e-6,
                "img_token_compression_config": {
                    "spatial_merge_size": 2,
                    "temporal_patch_size": 2,
                },
                "patch_size": 14,
            },
            "image_token_index": 494,
            "video_token_index": 495,
        },
        has_own_configuration=False,
    ),
    "cosmos3_edge": Published(
        architecture="Cosmos3EdgeForConditionalGeneration",
        model_type="cosmos3_edge",
        experts="n_routed_experts",
        fields={
            "layers_block_type": ["full_attention", "moe"],
            "hidden_act": "relu2",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
            },
        },
        without=("num_hidden_layers",),
        inside="text_config",
        besides={
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            "projector_config": {
                "input_hidden_size": 64,
                "merger_intermediate_size": 64,
                "out_hidden_size": 128,
            },
        }
        | IMAGE_IDS,
        has_own_configuration=False,
    ),
}
"""By name."""

"""The families that vLLM knows since 0.33. Their kernels need a GPU, so nothing reads weights here."""

from gpu_checks.families import HEADS
from gpu_checks.published.writing import GROUPED, Fields, Published

NUM_LAYERS: int = HEADS["num_hidden_layers"]
SHARED: Fields = {"shared_expert_intermediate_size": 128, "norm_topk_prob": True}
HYBRID = ["linear_attention"] * (NUM_LAYERS - 1) + ["full_attention"]

NEWER: dict[str, Published] = {
    "beam": Published(
        architecture="BeamForCausalLM",
        model_type="beam",
        experts="num_experts",
        fields=GROUPED
        | {
            "norm_topk_prob": True,
            "layer_types": ["full_attention"] * NUM_LAYERS,
            "mlp_layer_types": ["dense"] + ["sparse"] * (NUM_LAYERS - 1),
            "sliding_window": 64,
        },
        has_own_configuration=False,
    ),
    "flint": Published(
        architecture="FlintForCausalLM",
        model_type="flint",
        experts="num_experts",
        fields=SHARED
        | {
            "layer_types": ["sliding_attention"] * (NUM_LAYERS - 1) + ["full_attention"],
            "sliding_window": 65,
        },
        has_own_configuration=False,
    ),
    "step5": Published(
        architecture="Step5ForCausalLM",
        model_type="step5",
        experts="num_experts",
        fields={"layer_types": ["full_attention"] * NUM_LAYERS},
        has_own_configuration=False,
    ),
    "alice_ai": Published(
        architecture="AliceAIForCausalLM",
        model_type="alice_ai",
        experts="num_experts",
        fields=SHARED
        | {
            "layer_types": HYBRID,
            "block_attn_res_block_size": 1,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "kda_allow_negative_eigenvalues": False,
            "router_score_function": "sigmoid",
            "router_bias_correction": True,
        },
    ),
}
"""By name."""

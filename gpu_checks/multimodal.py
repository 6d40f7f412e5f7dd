"""Small configs of the families of transformers whose text model is one part of them."""

from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gpu_checks.families import (
    DERIVED,
    EXPERTS,
    FAMILIES,
    HEADS,
    QWEN3_5_TEXT,
    QWEN3_VL_TEXT,
    SLIDING_THEN_FULL,
    Builder,
)

VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
}
GEMMA4_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "position_embedding_size": 64,
}
IMAGE_TOKEN, IMAGE_TOKEN_ID = "<|img|>", 494
"""The first token that is free in the checkpoints' vocabulary."""
LLAMA4_TOKENS = {
    "boi_token_index": "<|image_start|>",
    "eoi_token_index": "<|image_end|>",
    "image_token_index": "<|patch|>",
}
VISION_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
"""Fields of a config and the tokens that they name, in the order of their ids from `IMAGE_TOKEN_ID`."""


def _with_vision(model_type: str, text: Builder, **vision: Any) -> Builder:
    """Describe a family whose text model has a config of its own, beside a vision tower's."""

    def build(count: int) -> transformers.PretrainedConfig:
        config: transformers.PretrainedConfig = CONFIG_MAPPING[model_type](
            text_config=text(count).to_dict(),
            vision_config=VISION | vision,
            dtype="bfloat16",
            tie_word_embeddings=False,
            **{field: IMAGE_TOKEN_ID + number for number, field in enumerate(VISION_TOKENS)},
        )
        return config

    return build


def _aria(num_experts: int) -> transformers.PretrainedConfig:
    """Return a vision tower with a projector to 128 tokens, and experts in fused tensors."""
    text = DERIVED | {"intermediate_size": 96, "head_dim": 32, "mlp_bias": False}
    return transformers.AriaConfig(
        text_config=text
        | {
            "moe_num_experts": num_experts,
            "moe_topk": 2,
            "moe_num_shared_experts": 1,
            "model_type": "aria_text",
        },
        vision_config={
            "model_type": "idefics3_vision",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 490,
            "patch_size": 14,
        },
        projector_patch_to_query_dict={1225: 128},
        image_token_index=IMAGE_TOKEN_ID,
        dtype="bfloat16",
    )


def _llama4(num_experts: int) -> transformers.PretrainedConfig:
    """Return a vision tower whose tiles of 56 pixels are four tokens each, and the text model."""
    return transformers.Llama4Config(
        text_config=FAMILIES["llama4_text"](num_experts).to_dict(),
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 256,  # of four patches, which the projector takes together
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "projector_input_dim": 128,
            "projector_output_dim": 128,
            "vision_output_dim": 128,
        },
        dtype="bfloat16",
        tie_word_embeddings=False,
        **{field: IMAGE_TOKEN_ID + number for number, field in enumerate(LLAMA4_TOKENS)},
    )


def _gemma4_multimodal(num_experts: int) -> transformers.PretrainedConfig:
    """Return a vision tower and the text model."""
    return transformers.Gemma4Config(
        text_config=FAMILIES["gemma4"](num_experts).to_dict(),
        vision_config=GEMMA4_VISION,
        audio_config=None,
        dtype="bfloat16",
        tie_word_embeddings=True,
        **dict.fromkeys(("image_token_id", "boi_token_id", "eoi_token_id"), IMAGE_TOKEN_ID),
        **dict.fromkeys(("video_token_id", "audio_token_id", "boa_token_id"), IMAGE_TOKEN_ID),
    )


def _diffusion_gemma(num_experts: int) -> transformers.PretrainedConfig:
    """Return Gemma-4's parts, whose text model makes `canvas_length` tokens of noise at a time."""
    return transformers.DiffusionGemmaConfig(
        text_config=HEADS
        | EXPERTS
        | {
            "num_experts": num_experts,
            "top_k_experts": 2,
            "layer_types": SLIDING_THEN_FULL,
            "sliding_window": 64,
            "tie_word_embeddings": True,
            "per_layer_config": {},
        },
        vision_config=GEMMA4_VISION,
        canvas_length=16,
        dtype="bfloat16",
        tie_word_embeddings=True,
        image_token_id=IMAGE_TOKEN_ID,
    )


def _gemma4_unified(num_experts: int) -> transformers.PretrainedConfig:
    """Return a model without towers; published ones have no experts, whose fields vLLM reads."""
    text = FAMILIES["gemma4"](num_experts).to_dict() | {"model_type": "gemma4_unified_text"}
    config = transformers.Gemma4UnifiedConfig(
        text_config=text,
        vision_config={"mm_embed_dim": 64, "mm_posemb_size": 64, "output_proj_dims": 64},
        audio_config=None,
        dtype="bfloat16",
        tie_word_embeddings=True,
        **dict.fromkeys(("image_token_id", "boi_token_id", "eoi_token_id"), IMAGE_TOKEN_ID),
        **dict.fromkeys(("video_token_id", "audio_token_id", "boa_token_id"), IMAGE_TOKEN_ID),
    )
    return config


def _qwen3_omni(num_experts: int) -> transformers.PretrainedConfig:
    """Return the part that vLLM serves: towers for pictures and sound, and the text model."""
    text = QWEN3_VL_TEXT(num_experts).to_dict() | {
        "model_type": "qwen3_omni_moe_text",
        "num_experts": num_experts,
    }
    tower = VISION | {
        "deepstack_visual_indexes": [0],
        "patch_size": 16,
        "image_size": 128,
        "apply_vit_abs_pos_embed": True,
    }
    sound = {
        "d_model": 64,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 96,
        "downsample_hidden_size": 32,
        "output_dim": 128,
        "num_mel_bins": 16,
    }
    config = transformers.Qwen3OmniMoeConfig(
        thinker_config={
            "text_config": text,
            "vision_config": tower,
            "audio_config": sound,
            **{field: IMAGE_TOKEN_ID + number for number, field in enumerate(VISION_TOKENS)},
            "audio_token_id": IMAGE_TOKEN_ID + len(VISION_TOKENS),
        },
        enable_audio_output=False,
        dtype="bfloat16",
    )
    config.architectures = ["Qwen3OmniMoeForConditionalGeneration"]
    return config


def _clef_omni(num_experts: int) -> transformers.PretrainedConfig:
    """Return Qwen3-Omni with a head, which `checkpoints.py` writes into a file of its own."""
    config = _qwen3_omni(num_experts)
    config.joint_head_config = {
        "hidden_size": 128,
        "width": 32,
        "routing_layers": 1,
        "layers": 1,
        "heads": 2,
        "feedforward": 64,
    }
    return config


def _colqwen(num_experts: int) -> transformers.PretrainedConfig:
    """Return Qwen3.5 with a projection to vectors, which `checkpoints.py` writes."""
    config = MULTIMODAL["qwen3_5_moe"](num_experts)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    config.retrieval_attention_contract = "causal"
    return config


def _minicpm(model_type: str) -> Builder:
    """Describe a small vision tower before Qwen3.5's text model."""

    def build(num_experts: int) -> transformers.PretrainedConfig:
        config: transformers.PretrainedConfig = CONFIG_MAPPING[model_type](
            text_config=QWEN3_5_TEXT(num_experts).to_dict(),
            vision_config={
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
            },
            insert_layer_id=0,
            image_size=56,
            image_token_id=IMAGE_TOKEN_ID,
            video_token_id=IMAGE_TOKEN_ID + 1,
            dtype="bfloat16",
        )
        return config

    return build


_QWEN3_VL = _with_vision("qwen3_vl_moe", QWEN3_VL_TEXT, deepstack_visual_indexes=[0], patch_size=16)
"""Published ones have other tensors than those that transformers saves: see `TRANSPOSED`."""

MULTIMODAL: dict[str, Builder] = {
    "diffusion_gemma": _diffusion_gemma,
    "gemma4_unified": _gemma4_unified,
    "qwen3_omni_moe": _qwen3_omni,
    "clef_omni": _clef_omni,
    "colqwen3_5": _colqwen,
    "minicpmv4_6": _minicpm("minicpmv4_6"),
    "minicpmv4_7": _minicpm("minicpmv4_7"),
    "aria": _aria,
    "llama4": _llama4,
    "gemma4_multimodal": _gemma4_multimodal,
    "qwen3_vl_moe": _QWEN3_VL,
    "qwen3_vl_moe_saved": _QWEN3_VL,
    "qwen3_5_moe": _with_vision("qwen3_5_moe", QWEN3_5_TEXT, patch_size=16),
}
"""By name."""

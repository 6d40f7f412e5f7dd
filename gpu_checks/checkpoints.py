"""Checkpoints with random weights of every family that is tested; `quantised.py` rewrites them.

The files have the layout (per-expert or fused 3-D tensors) that real checkpoints of that family have:
transformers' own `save_pretrained` writes them.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

from gpu_checks.families import FAMILIES, IMAGE_TOKEN, LLAMA4_TOKENS, VISION_TOKENS
from gpu_checks.published import PUBLISHED, write_published
from vllm_dwdp.entrypoints.bench.checkpoints import COMMON, DONE, qwen3_moe, write_checkpoint

DERIVED_HEADS = {key: value for key, value in COMMON.items() if key != "head_dim"}
"""`COMMON` for families whose heads have the size that the hidden size gives them."""


def _qwen3_moe_mixed(num_experts: int) -> transformers.PretrainedConfig:
    """Layers with and without experts, mixed."""
    config = qwen3_moe(num_experts)
    config.num_hidden_layers = 4
    config.mlp_only_layers = [1]
    return config


def _qwen2_moe(num_experts: int) -> transformers.PretrainedConfig:
    return transformers.Qwen2MoeConfig(
        **DERIVED_HEADS,
        intermediate_size=160,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=160,
        num_experts=num_experts,
        num_experts_per_tok=2,
    )


def _mixtral(num_experts: int) -> transformers.PretrainedConfig:
    return transformers.MixtralConfig(
        **COMMON, intermediate_size=96, num_local_experts=num_experts, num_experts_per_tok=2
    )


def _dbrx(num_experts: int) -> transformers.PretrainedConfig:
    """vLLM does not count its experts: to test the refusal."""
    return transformers.DbrxConfig(
        d_model=160,
        n_heads=5,
        n_layers=2,
        max_seq_len=2048,
        vocab_size=512,
        attn_config={"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={
            "ffn_hidden_size": 96,
            "moe_num_experts": num_experts,
            "moe_top_k": 2,
            "hidden_size": 160,
        },
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def _olmoe(num_experts: int) -> transformers.PretrainedConfig:
    return transformers.OlmoeConfig(
        **DERIVED_HEADS, intermediate_size=96, num_experts=num_experts, num_experts_per_tok=2
    )


def _granite_moe(num_experts: int) -> transformers.PretrainedConfig:
    return transformers.GraniteMoeConfig(
        **DERIVED_HEADS, intermediate_size=96, num_local_experts=num_experts, num_experts_per_tok=2
    )


def _glm4_moe(num_experts: int) -> transformers.PretrainedConfig:
    """Return a dense first layer, a shared expert, a score-correction bias."""
    return transformers.Glm4MoeConfig(
        **COMMON,
        intermediate_size=160,
        moe_intermediate_size=96,
        n_routed_experts=num_experts,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        use_qk_norm=True,
        partial_rotary_factor=0.5,
    )


def _gpt_oss(num_experts: int) -> transformers.PretrainedConfig:
    """Experts with biases, stored as fused 3-D tensors."""
    return transformers.GptOssConfig(
        **COMMON,
        intermediate_size=96,
        num_local_experts=num_experts,
        num_experts_per_tok=2,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


def _deepseek(base: type, num_experts: int, **extra: Any) -> transformers.PretrainedConfig:
    common = DERIVED_HEADS | {"num_attention_heads": 4, "num_key_value_heads": 4}
    config: transformers.PretrainedConfig = base(
        **common,
        intermediate_size=160,
        moe_intermediate_size=96,
        n_routed_experts=num_experts,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        **extra,
    )
    return config


def _deepseek_v2(num_experts: int) -> transformers.PretrainedConfig:
    return _deepseek(transformers.DeepseekV2Config, num_experts, topk_method="greedy")


def _deepseek_v3(num_experts: int) -> transformers.PretrainedConfig:
    return _deepseek(
        transformers.DeepseekV3Config, num_experts, topk_method="noaux_tc", scoring_func="sigmoid"
    )


ARCHITECTURES: dict[str, Callable[[int], transformers.PretrainedConfig]] = {
    "qwen3_moe": qwen3_moe,
    "qwen3_moe_mixed": _qwen3_moe_mixed,
    "qwen2_moe": _qwen2_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "dbrx": _dbrx,
    "granite_moe": _granite_moe,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}


PUBLISHED_AS = {"phimoe": "PhiMoEForCausalLM"}
"""What published configs call an architecture, where transformers calls it otherwise."""


TRANSPOSED = ("qwen3_vl_moe",)
"""Families whose published experts are `[num_experts, inputs, outputs]`, and transformers' are not."""


def make_checkpoint(
    folder: Path, architecture: str, num_experts: int = 8, seed: int = 0, **overrides: Any
) -> Path:
    """Write a checkpoint of random bf16 weights and return `folder`.

    Args:
        folder: created if absent; a folder that holds a finished checkpoint is kept as it is.
        architecture: a key of `ARCHITECTURES`, `FAMILIES` or `PUBLISHED`.
        num_experts: routed experts per MoE layer.
        seed: of the weights.
        overrides: fields of the Hugging Face config, e.g. `hidden_size=1024`.
    """
    if architecture in PUBLISHED:
        return write_published(folder, PUBLISHED[architecture], num_experts, seed, **overrides)
    if (folder / DONE).exists():
        return folder
    builder = (ARCHITECTURES | FAMILIES)[architecture]
    write_checkpoint(folder, builder(num_experts), seed, **overrides)
    if architecture in PUBLISHED_AS:
        file = folder / "config.json"
        config = json.loads(file.read_text()) | {"architectures": [PUBLISHED_AS[architecture]]}
        file.write_text(json.dumps(config, indent=2))
    if architecture in TRANSPOSED:
        _transpose_experts(folder / "model.safetensors")
    if architecture in PROCESSORS:
        PROCESSORS[architecture](folder)
    return folder


def _transpose_experts(file: Path) -> None:
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensors[name] = tensor.transpose(1, 2).contiguous()
    save_file(tensors, file, {"format": "pt"})


def _save_aria_processor(folder: Path) -> None:
    """Let the tokenizer of a checkpoint know a token for images, and write what prepares them."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
        folder, extra_special_tokens={"image_token": IMAGE_TOKEN}
    )
    images = AriaImageProcessorPil(max_image_size=490, min_image_size=70)
    transformers.AriaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        size_conversion={490: 128},
    ).save_pretrained(folder)


def _write_processor(folder: Path, tokens: list[str], files: dict[str, dict[str, Any]]) -> None:
    """Let the tokenizer know the tokens for images, and say what prepares these.

    transformers makes such a processor only where torchvision is installed, so the files are written.
    """
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.save_pretrained(folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def _save_qwen_vl_processor(folder: Path) -> None:
    sizes = {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
    }
    files = {
        "preprocessor_config": {"image_processor_type": "Qwen2VLImageProcessor"} | sizes,
        "video_preprocessor_config": {"video_processor_type": "Qwen3VLVideoProcessor"} | sizes,
    }
    _write_processor(folder, list(VISION_TOKENS.values()), files)


def _save_llama4_processor(folder: Path) -> None:
    tiles: dict[str, Any] = {"size": {"height": 56, "width": 56}, "max_patches": 4}
    separators = ["<|image|>", "<|tile_x_separator|>", "<|tile_y_separator|>"]
    named: dict[str, Any] = {"processor_class": "Llama4Processor"}
    files = {
        "preprocessor_config": {"image_processor_type": "Llama4ImageProcessor"} | tiles | named,
        "processor_config": named | {"patch_size": 14, "pixel_shuffle_ratio": 0.5},
    }
    _write_processor(folder, [*LLAMA4_TOKENS.values(), *separators], files)


PROCESSORS: dict[str, Callable[[Path], None]] = {
    "aria": _save_aria_processor,
    "qwen3_vl_moe": _save_qwen_vl_processor,
    "qwen3_5_moe": _save_qwen_vl_processor,
    "llama4": _save_llama4_processor,
}
"""What writes the processor of a family whose checkpoints are asked with images."""


def main() -> None:
    """Write one: `FOLDER --architecture qwen3_moe --experts 8`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--architecture", choices=sorted(ARCHITECTURES | FAMILIES | PUBLISHED), default="qwen3_moe"
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--config", type=json.loads, default={}, help="JSON overrides")
    options = parser.parse_args()
    print(make_checkpoint(options.folder, options.architecture, options.experts, **options.config))


if __name__ == "__main__":
    main()

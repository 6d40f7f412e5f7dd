"""What published checkpoints have and transformers' `save_pretrained` does not write.

Other layouts of experts, heads of models that pool, and the files of processors for pictures.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

from gpu_checks.multimodal import IMAGE_TOKEN, LLAMA4_TOKENS, VISION_TOKENS
from gpu_checks.published import add_tokens

TRANSPOSED = ("qwen3_vl_moe",)
"""Families whose published experts are `[num_experts, inputs, outputs]`, and transformers' are not."""


def transpose_experts(file: Path) -> None:
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
    add_tokens(folder, tokens)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


QWEN_SIZES: dict[str, Any] = {
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
}


def _save_qwen_vl_processor(folder: Path) -> None:
    sizes = {"processor_class": "Qwen3VLProcessor"} | QWEN_SIZES
    files = {
        "preprocessor_config": {"image_processor_type": "Qwen2VLImageProcessor"} | sizes,
        "video_preprocessor_config": {"video_processor_type": "Qwen3VLVideoProcessor"} | sizes,
    }
    _write_processor(folder, list(VISION_TOKENS.values()), files)


def _save_omni_processor(folder: Path) -> None:
    """Name the tokens for pictures and sound in the tokenizer, where the processor looks for them."""
    sound = ("<|audio_pad|>", "<|audio_start|>", "<|audio_end|>")
    names = ("vision_bos", "vision_eos", "image", "video", "audio", "audio_bos", "audio_eos")
    tokens = zip(names, (*VISION_TOKENS.values(), *sound), strict=True)
    transformers.PreTrainedTokenizerFast.from_pretrained(
        folder, extra_special_tokens={f"{name}_token": token for name, token in tokens}
    ).save_pretrained(folder)
    named = {"processor_class": "Qwen3OmniMoeProcessor"} | QWEN_SIZES
    files: dict[str, dict[str, Any]] = {
        "preprocessor_config": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": 16,
        },
        "video_preprocessor_config": {"video_processor_type": "Qwen2VLVideoProcessor"},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content | named))


def _save_llama4_processor(folder: Path) -> None:
    tiles: dict[str, Any] = {"size": {"height": 56, "width": 56}, "max_patches": 4}
    separators = ["<|image|>", "<|tile_x_separator|>", "<|tile_y_separator|>"]
    named: dict[str, Any] = {"processor_class": "Llama4Processor"}
    files = {
        "preprocessor_config": {"image_processor_type": "Llama4ImageProcessor"} | tiles | named,
        "processor_config": named | {"patch_size": 14, "pixel_shuffle_ratio": 0.5},
    }
    _write_processor(folder, [*LLAMA4_TOKENS.values(), *separators], files)


def _say_how_to_denoise(folder: Path) -> None:
    """Write a generation_config.json with which a canvas takes a few steps."""
    content = {
        "max_denoising_steps": 4,
        "stability_threshold": 1,
        "confidence_threshold": 0.005,
        "t_min": 0.4,
        "t_max": 0.8,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    }
    (folder / "generation_config.json").write_text(json.dumps(content))


PROCESSORS: dict[str, Callable[[Path], None]] = {
    "aria": _save_aria_processor,
    "diffusion_gemma": _say_how_to_denoise,
    "qwen3_vl_moe": _save_qwen_vl_processor,
    "qwen3_5_moe": _save_qwen_vl_processor,
    "qwen3_vl_moe_saved": _save_qwen_vl_processor,
    "colqwen3_5": _save_qwen_vl_processor,
    "qwen3_omni_moe": _save_omni_processor,
    "llama4": _save_llama4_processor,
}
"""What writes files of a family beside its weights: processors of pictures, and how to generate."""


def _save_joint_head(folder: Path, dice: torch.Generator) -> None:
    """Write Clef's head beside the model, and the index that names the model's file alone."""
    described = json.loads((folder / "config.json").read_text())["joint_head_config"]
    head = {
        name: torch.randn(tensor.shape, generator=dice).to(torch.bfloat16)
        for name, tensor in _joint_head(**described).state_dict().items()
    }
    head |= {f"{name}_logit_scale": torch.zeros(()) for name in ("prior", "joint")}
    head["residual_gate"] = torch.zeros(())
    save_file(head, folder / "joint_head.safetensors", {"format": "pt"})
    names = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _joint_head(
    hidden_size: int, width: int, routing_layers: int, layers: int, heads: int, feedforward: int
) -> nn.Module:
    """Return modules whose names and shapes are those of Clef's head."""
    projected = ("memory", "question", "option_question", "global")
    projections = (*projected, "option_context", "option_lexical")
    evidence = {
        "query_norm": nn.LayerNorm(width),
        "memory_norm": nn.LayerNorm(width),
        "attention": nn.MultiheadAttention(width, heads),
        "feedforward_norm": nn.LayerNorm(width),
        "feedforward": _two_layers(width, feedforward, width),
    }
    parts: dict[str, nn.Module] = {
        "hidden_norm": nn.LayerNorm(hidden_size),
        "type_embedding": nn.Embedding(3, width),
        "evidence_layers": nn.ModuleList(nn.ModuleDict(evidence) for _ in range(routing_layers)),
        "layers": nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, feedforward) for _ in range(layers)
        ),
        "residual_scorer": _two_layers(4 * width, width, 1),
    }
    norms = ("option_summary_norm", "field_norm", "option_norm")
    parts |= {name: nn.LayerNorm(width) for name in norms}
    parts |= {f"{name}_projection": nn.Linear(hidden_size, width, False) for name in projections}
    return nn.ModuleDict(parts)


def _two_layers(inputs: int, middle: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, middle), nn.GELU(), nn.Identity(), nn.Linear(middle, outputs)
    )


def _save_projection(folder: Path, dice: torch.Generator) -> None:
    """Give the tensors ColPali's names, and add the projection of a token to its vector."""
    file = folder / "model.safetensors"
    tensors = {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(file).items()
        if name != "lm_head.weight"
    }
    for name, shape in (("weight", (128, 128)), ("bias", (128,))):
        drawn = 0.1 * torch.randn(shape, generator=dice)
        tensors[f"custom_text_proj.{name}"] = drawn.to(torch.bfloat16)
    save_file(tensors, file, {"format": "pt"})


HEADS: dict[str, Callable[[Path, torch.Generator], None]] = {
    "clef_omni": _save_joint_head,
    "colqwen3_5": _save_projection,
}
"""What writes the head of a model that transformers has without it."""

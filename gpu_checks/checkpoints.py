"""Checkpoints with random weights of every family that is tested; `quantised.py` rewrites them.

The files have the layout (per-expert or fused 3-D tensors) that real checkpoints of that family have:
transformers' own `save_pretrained` writes them.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

from gpu_checks.families import FAMILIES
from gpu_checks.multimodal import IMAGE_TOKEN, LLAMA4_TOKENS, MULTIMODAL, VISION_TOKENS
from gpu_checks.published import PUBLISHED, add_tokens, write_published
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
BUILT = ARCHITECTURES | FAMILIES | MULTIMODAL
"""What transformers builds, by name."""
NAMES = BUILT.keys() | PUBLISHED.keys()


PUBLISHED_AS = {
    "phimoe": "PhiMoEForCausalLM",
    "clef_omni": "ClefOmniForJointSchema",
    "colqwen3_5": "ColQwen3_5",
}
"""What published configs call an architecture, where transformers calls it otherwise."""


TRANSPOSED = ("qwen3_vl_moe",)
"""Families whose published experts are `[num_experts, inputs, outputs]`, and transformers' are not."""


GRAFTED = {"gemma4_unified": "gemma4"}
"""Families whose experts vLLM reads and transformers does not write, and where such ones are found."""


def make_checkpoint(
    folder: Path, architecture: str, num_experts: int = 8, seed: int = 0, **overrides: Any
) -> Path:
    """Write a checkpoint of random bf16 weights and return `folder`.

    Args:
        folder: created if absent; a folder that holds a finished checkpoint is kept as it is.
        architecture: one of `NAMES`.
        num_experts: routed experts per MoE layer.
        seed: of the weights.
        overrides: fields of the Hugging Face config, e.g. `hidden_size=1024`.
    """
    if architecture in PUBLISHED:
        return write_published(folder, PUBLISHED[architecture], num_experts, seed, **overrides)
    if (folder / DONE).exists():
        return folder
    builder = BUILT[architecture]
    write_checkpoint(folder, builder(num_experts), seed, **overrides)
    if architecture in PUBLISHED_AS:
        file = folder / "config.json"
        config = json.loads(file.read_text()) | {"architectures": [PUBLISHED_AS[architecture]]}
        file.write_text(json.dumps(config, indent=2))
    if architecture in TRANSPOSED:
        _transpose_experts(folder / "model.safetensors")
    if architecture in GRAFTED:
        _graft_experts(folder, GRAFTED[architecture], num_experts, seed)
    if architecture in HEADS:
        HEADS[architecture](folder, torch.Generator().manual_seed(seed))
    if architecture in PROCESSORS:
        PROCESSORS[architecture](folder)
    return folder


def _graft_experts(folder: Path, family: str, num_experts: int, seed: int) -> None:
    """Put the layers of a family that is text alone in the place of a checkpoint's."""
    text = make_checkpoint(folder / family, family, num_experts, seed) / "model.safetensors"
    layers = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(text).items()
    }
    file = folder / "model.safetensors"
    save_file(load_file(file) | layers, file, {"format": "pt"})
    shutil.rmtree(folder / family)


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
    add_tokens(folder, tokens)
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
    "qwen3_vl_moe_saved": _save_qwen_vl_processor,
    "colqwen3_5": _save_qwen_vl_processor,
    "llama4": _save_llama4_processor,
}
"""What writes the processor of a family whose checkpoints are asked with images."""


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


def main() -> None:
    """Write one: `FOLDER --architecture qwen3_moe --experts 8`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architecture", choices=sorted(NAMES), default="qwen3_moe")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--config", type=json.loads, default={}, help="JSON overrides")
    options = parser.parse_args()
    print(make_checkpoint(options.folder, options.architecture, options.experts, **options.config))


if __name__ == "__main__":
    main()

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

from gpu_checks.beside_weights import HEADS, PROCESSORS, TRANSPOSED, transpose_experts
from gpu_checks.families import FAMILIES
from gpu_checks.multimodal import MULTIMODAL
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
    """vLLM does not count its experts, which are in a part of the config."""
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
        transpose_experts(folder / "model.safetensors")
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

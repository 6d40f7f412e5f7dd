"""Checkpoints with random weights in the formats in which models are published.

`FORMATS` says of each how the experts of a bf16 checkpoint are rewritten and what its config tells of
it. Everything but the experts stays bf16, so that nothing but their kernels differs. The seed decides
the weights: two formats of one seed are roundings of the same model.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from gpu_checks import number_formats as numbers
from gpu_checks import quantised_configs as configs
from gpu_checks import quantised_experts as experts
from gpu_checks.checkpoints import make_checkpoint
from gpu_checks.quantised_experts import EXPERT, Tensors

SHAPE = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256}
"""Multiples of every block and group; a projection has eight pages at four bits a number."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a checkpoint is published.

    Args:
        rewrite: the tensors of a bf16 checkpoint, by name.
        quantization_config: of the config, for linear layers that stay bf16; absent if nothing does.
        architecture: a key of `gpu_checks.checkpoints.ARCHITECTURES`, unless another is asked for.
    """

    rewrite: Callable[[Tensors], Tensors]
    quantization_config: configs.MakeConfig | None
    architecture: str = "qwen3_moe"


FORMATS: dict[str, Format] = {
    "bf16_fused": Format(rewrite=experts.fuse, quantization_config=None),
    "fp8_block": Format(
        rewrite=experts.expert_by_expert(experts.fp8_block),
        quantization_config=configs.fp8("dynamic", weight_block_size=[numbers.FP8_BLOCK] * 2),
    ),
    "fp8_tensor": Format(
        rewrite=experts.expert_by_expert(experts.fp8_tensor),
        quantization_config=configs.fp8("dynamic"),
    ),
    "fp8_tensor_static": Format(
        rewrite=experts.expert_by_expert(experts.fp8_tensor_static),
        quantization_config=configs.fp8("static"),
    ),
    "modelopt_fp8": Format(
        rewrite=experts.expert_by_expert(experts.fp8_tensor_static),
        quantization_config=configs.modelopt("FP8"),
    ),
    "ct_fp8_channel": Format(
        rewrite=experts.expert_by_expert(experts.fp8_channel),
        quantization_config=configs.compressed(
            "float-quantized", {"type": "float", "strategy": "channel"}, {"type": "float"}
        ),
    ),
    "ct_int8": Format(
        rewrite=experts.expert_by_expert(experts.int8_channel),
        quantization_config=configs.compressed("int-quantized", {"strategy": "channel"}, {}),
    ),
    "ct_int4": Format(
        rewrite=experts.expert_by_expert(experts.packed_int4(experts.INT4_GROUP)),
        quantization_config=configs.compressed(
            "pack-quantized", configs.int4_group(experts.INT4_GROUP), None
        ),
    ),
    "ct_int4_g32": Format(
        rewrite=experts.expert_by_expert(experts.packed_int4(32)),
        quantization_config=configs.compressed("pack-quantized", configs.int4_group(32), None),
    ),
    "ct_nvfp4": Format(
        rewrite=experts.expert_by_expert(experts.packed_nvfp4),
        quantization_config=configs.compressed(
            "nvfp4-pack-quantized",
            configs.FOUR_BIT_FLOAT,
            configs.FOUR_BIT_FLOAT | {"dynamic": "local"},
        ),
    ),
    "modelopt_nvfp4": Format(
        rewrite=experts.expert_by_expert(experts.modelopt_nvfp4),
        quantization_config=configs.modelopt("NVFP4", group_size=numbers.NVFP4_GROUP),
    ),
    "gptq": Format(
        rewrite=experts.expert_by_expert(experts.gptq), quantization_config=configs.gptq
    ),
    "awq": Format(rewrite=experts.expert_by_expert(experts.awq), quantization_config=configs.awq),
    "gpt_oss_mxfp4": Format(
        rewrite=experts.gpt_oss_mxfp4, quantization_config=configs.mxfp4, architecture="gpt_oss"
    ),
}


def make_quantised_checkpoint(
    folder: Path,
    format_name: str,
    num_experts: int = 8,
    seed: int = 0,
    architecture: str | None = None,
    **overrides: Any,
) -> Path:
    """Write a checkpoint in a key of `FORMATS`, as `make_checkpoint` does, and return `folder`.

    Args:
        folder: created if absent; a folder that holds a finished checkpoint is kept as it is.
        format_name: a key of `FORMATS`.
        num_experts: routed experts per MoE layer.
        seed: of the weights.
        architecture: another than the format's own; its experts are saved one by one.
        overrides: fields of the Hugging Face config, over `SHAPE`.
    """
    chosen = FORMATS[format_name]
    done = folder / f"{format_name}.done"
    if not done.exists():
        shape = SHAPE | overrides
        make_checkpoint(folder, architecture or chosen.architecture, num_experts, seed, **shape)
        _rewrite(folder, chosen)
        done.touch()
    return folder


def _rewrite(folder: Path, chosen: Format) -> None:
    path = folder / "model.safetensors"
    before = load_file(path)
    after = chosen.rewrite(before)
    assert after.keys() != before.keys() or chosen.quantization_config, f"{path}: no expert"
    save_file({name: each.contiguous() for name, each in after.items()}, path, {"format": "pt"})
    if chosen.quantization_config is not None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = chosen.quantization_config(_linear_layers(before))
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def _linear_layers(tensors: Tensors) -> list[str]:
    """Names of the modules, other than experts, with a matrix."""
    return [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dim() == 2 and not EXPERT.match(name)
    ]


def main() -> None:
    """Write one: `FOLDER --format gptq --experts 8`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=sorted(FORMATS), default="fp8_block")
    parser.add_argument("--architecture", help="another than the format's own")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--config", type=json.loads, default={}, help="JSON overrides")
    chosen = parser.parse_args()
    print(
        make_quantised_checkpoint(
            chosen.folder,
            chosen.format,
            chosen.experts,
            architecture=chosen.architecture,
            **chosen.config,
        )
    )


if __name__ == "__main__":
    main()

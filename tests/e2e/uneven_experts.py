"""A Qwen3-MoE whose layers have different numbers of experts, which no model of vLLM's has on CPUs.

The checkpoint lacks experts of one layer, and vLLM is made to build that layer with fewer.
"""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from vllm.model_executor.models.qwen3_moe import Qwen3MoeSparseMoeBlock

LAYER, FEWER = 1, 5
"""The layer with fewer experts, and how many it has."""
REPLACE = {
    "replace": [
        "vllm.model_executor.models.qwen3_moe:Qwen3MoeSparseMoeBlock.__init__",
        "tests.e2e.uneven_experts:build_block",
    ]
}
"""Of a case of `engine_process`."""
_stock = Qwen3MoeSparseMoeBlock.__init__


def build_block(self: Any, vllm_config: Any, prefix: str = "", **others: Any) -> None:
    """In the place of vLLM's: the same, of a config with fewer experts in one layer."""
    config = vllm_config.model_config.hf_text_config
    num_experts = config.num_experts
    if f".{LAYER}." in prefix:
        config.num_experts = FEWER
    try:
        _stock(self, vllm_config, prefix, **others)
    finally:
        config.num_experts = num_experts


def take_experts_away(checkpoint: Path, folder: Path) -> str:
    """Copy a checkpoint without the last experts of one layer, and without their rows of its router."""
    shutil.copytree(checkpoint, folder)
    file = folder / "model.safetensors"
    start = f"model.layers.{LAYER}.mlp."
    kept = {}
    for name, tensor in load_file(file).items():
        if name == f"{start}gate.weight":
            kept[name] = tensor[:FEWER].contiguous()
        elif not name.startswith(f"{start}experts.") or expert_of(name, start) < FEWER:
            kept[name] = tensor
    save_file(kept, file, {"format": "pt"})
    return str(folder)


def expert_of(name: str, start: str) -> int:
    return int(name.removeprefix(f"{start}experts.").split(".")[0])

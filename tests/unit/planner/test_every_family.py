"""The planner counts the routed experts of every small checkpoint: their bytes are those in its file."""

from pathlib import Path

import pytest
from safetensors import safe_open

from gpu_checks.checkpoints import NAMES, make_checkpoint
from gpu_checks.published import PUBLISHED
from vllm_dwdp.planner.checkpoint import read_config
from vllm_dwdp.planner.model_shape import shape_of

WITHOUT_WEIGHTS = {name for name, family in PUBLISHED.items() if family.tensors is None}
COMPRESSED = {"deepseek_v41"}
"""What their layers keep is unknown to the planner, which says so."""
STEP = (".moe.gate_proj", ".moe.up_proj", ".moe.down_proj")
NAMED = (".experts.", ".block_sparse_moe.input_", ".block_sparse_moe.output_", *STEP)
"""In the names of routed experts' tensors."""


@pytest.mark.parametrize("name", sorted(NAMES - WITHOUT_WEIGHTS - COMPRESSED))
def test_the_bytes_of_routed_experts(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, name)
    found = 0
    weights = next(folder.glob("model.safetensors"), folder / "consolidated.safetensors")
    with safe_open(weights, "pt") as file:
        for each in file.keys():  # noqa: SIM118 (no mapping)
            if any(part in each for part in NAMED) and not each.endswith("bias"):
                found += file.get_tensor(each).nbytes
    assert shape_of(read_config(folder)).experts_bytes == found


@pytest.mark.parametrize("name", sorted(WITHOUT_WEIGHTS - COMPRESSED))
def test_experts_without_weights_are_counted(name: str, tmp_path: Path) -> None:
    shape = shape_of(read_config(make_checkpoint(tmp_path, name)))
    assert shape.num_experts == 8
    assert shape.moe_layers

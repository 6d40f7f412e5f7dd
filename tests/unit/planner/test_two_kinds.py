"""ERNIE-VL's layers have experts for text and as many others for pictures: both are planned."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from gpu_checks.checkpoints import make_checkpoint
from tests.unit.planner.models import TRAFFIC
from vllm_dwdp.planner.checkpoint import read_config
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.estimates import redundancy
from vllm_dwdp.planner.hardware import find_hardware
from vllm_dwdp.planner.memory import memory_bytes
from vllm_dwdp.planner.model_shape import shape_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ernie") / "model", "ernie4_5_vl_moe")


def test_bytes_are_those_of_the_checkpoint(folder: Path) -> None:
    shape = shape_of(read_config(folder))
    kinds = [0, 0]
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if ".mlp.experts." in name:
                number = int(name.split(".experts.")[1].split(".")[0])
                kinds[number >= 8] += file.get_tensor(name).nbytes
    assert shape.num_other_layers == shape.num_moe_layers
    text = shape.num_moe_layers * shape.num_experts * shape.expert_bytes
    assert [text, shape.experts_bytes - text] == kinds
    assert kinds[0] > kinds[1] > 0


def test_a_rank_has_its_part_of_both_kinds_and_slots_for_the_larger(folder: Path) -> None:
    hardware = find_hardware("gb200", None)
    shape = shape_of(read_config(folder))
    model = CostModel(shape=shape, hardware=hardware, efficiency=hardware.efficiency, group_size=2)
    sizes = memory_bytes(model)
    assert sizes.experts == shape.experts_bytes / 2
    assert sizes.slots == 2 * 4 * shape.expert_bytes, "two slots of four remote experts"
    assert model.remote_bytes * shape.num_moe_layers == shape.experts_bytes / 2
    spare, _, _ = redundancy(model, TRAFFIC)
    assert spare == 4


@pytest.mark.parametrize(
    ("first", "last", "expected"), [([1, 2], [2, 2], 1), ([1, 1], [2, 1], 1), ([1, 1], [2, 2], 2)]
)
def test_either_kind_may_begin_and_end_elsewhere(
    folder: Path, first: list[int], last: list[int], expected: int
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"moe_layer_start_index": first, "moe_layer_end_index": last}
    shape = shape_of(config)
    assert (shape.num_moe_layers, shape.num_other_layers) == (2, expected)
    text = shape.num_moe_layers * shape.num_experts * shape.expert_bytes
    others = expected * shape.num_experts * shape.other_expert_params * 2
    assert shape.experts_bytes == pytest.approx(text + others)

"""Checkpoints of families whose code is published with their weights, before any engine reads them."""

import filecmp
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from gpu_checks.checkpoints import make_checkpoint
from gpu_checks.published import PUBLISHED, TABLE

WITH_WEIGHTS = [name for name, family in PUBLISHED.items() if family.tensors is not None]


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_every_expert_is_another(name: str, tmp_path: Path) -> None:
    """Experts that were alike would hide one that is in another's place."""
    weights = load_file(make_checkpoint(tmp_path, name) / PUBLISHED[name].weights_name)
    drawn = {each: tensor for each, tensor in weights.items() if tensor.dim() > 1}
    rows = [row for tensor in drawn.values() for row in (tensor if tensor.dim() == 3 else [tensor])]
    seen = {row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows}
    assert len(seen) == len(rows)
    tables = {each: tensor for each, tensor in weights.items() if each.endswith(TABLE)}
    assert all(0 <= tensor.min() < tensor.max() < 8 for tensor in tables.values())


def test_a_seed_gives_the_same_file(tmp_path: Path) -> None:
    first, same, other = (
        make_checkpoint(tmp_path / str(number), "deepseek", seed=seed) / "model.safetensors"
        for number, seed in enumerate((0, 0, 1))
    )
    assert filecmp.cmp(first, same, shallow=False)
    assert not filecmp.cmp(first, other, shallow=False)


def test_a_checkpoint_that_is_there_is_kept(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "bailing_moe", vocab_size=320)
    make_checkpoint(tmp_path, "bailing_moe")
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 320


def test_a_configuration_of_its_own_has_the_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = make_checkpoint(tmp_path / "model", "ernie4_5_vl_moe")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "ernie4_5_moe_vl"
    assert config.moe_intermediate_size == [96, 64]
    assert config.vision_config.patch_size == 14, "not a dictionary"

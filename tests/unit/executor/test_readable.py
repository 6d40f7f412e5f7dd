"""What is found wrong with a checkpoint before a group gives up the weights that it has."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import LoadConfig

from vllm_dwdp.errors import DwdpUnsupportedError, WeightUpdateError
from vllm_dwdp.executor.readable import check_readable


def check(
    path: str | None, *, model: str = "/first", load_format: str = "auto", net: Any = None
) -> None:
    """Check `path` for a rank that has read `model`."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(model=model, revision="v1", model_weights=""),
        load_config=LoadConfig(load_format=load_format, download_dir=net),
    )
    check_readable(config, SimpleNamespace(), path)
    assert config.model_config.model == model, "a reload that is given up changes nothing"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Make a checkpoint of two files with an index."""
    place = tmp_path / "step 1"
    place.mkdir()
    for number in (1, 2):
        save_file({f"w{number}": torch.ones(number * 8)}, place / f"model-{number}.safetensors")
    index = {"weight_map": {f"w{n}": f"model-{n}.safetensors" for n in (1, 2)}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return place


def test_a_checkpoint_that_is_whole_passes(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(str(whole))
    check(f"{whole}/")
    check(None, model=str(whole))
    check(str(whole / "model-1.safetensors"))
    monkeypatch.chdir(whole.parent)
    check(whole.name)
    other = {"weight_map": {"w1": "consolidated-1.safetensors"}}
    (whole / "consolidated.safetensors.index.json").write_text(json.dumps(other))
    check(str(whole))  # a download of one format only, with all small files
    save_file({}, whole / "empty.safetensors")
    (whole / "checkpoint-7").mkdir()
    (whole / "checkpoint-7" / "model.safetensors").touch()  # which a trainer writes beside
    check(str(whole))
    (whole / "vae").mkdir()
    for file in whole.glob("*.safetensors*"):
        file.rename(whole / "vae" / file.name)
    check(str(whole))  # some models keep theirs in folders of it


def test_what_is_cut_off_missing_or_no_checkpoint_is_named(whole: Path) -> None:
    file = whole / "model-2.safetensors"
    content = file.read_bytes()
    for part in (content[:-4], content[:20], b""):
        file.write_bytes(part)
        with pytest.raises(
            WeightUpdateError, match=rf"{file} is not whole: it has {len(part)} bytes"
        ):
            check(str(whole))
    file.unlink()
    with pytest.raises(WeightUpdateError, match=r"lists 2 files, and 1 of them .* as model-2.safe"):
        check(str(whole))
    (whole / "empty").mkdir()
    with pytest.raises(WeightUpdateError, match=r"empty has no weights \(\*.safetensors, "):
        check(str(whole / "empty"))
    with pytest.raises(WeightUpdateError, match=r"there is no /nowhere/at-all on this host"):
        check("/nowhere/at-all")


def test_a_mistyped_name_is_looked_up_on_the_hub_before_and_not_in_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="outgoing traffic has been disabled"):
        check("step-43", net=str(tmp_path))


def test_a_load_format_that_vllm_does_not_reload_is_named(whole: Path) -> None:
    with pytest.raises(
        DwdpUnsupportedError, match="cannot reload weights with --load-format dummy"
    ):
        check(str(whole), load_format="dummy")

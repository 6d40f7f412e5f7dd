"""What a rank says its model is: content, not names; and the same wherever it lies."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.fingerprint import Fingerprint
from vllm_dwdp.distributed.launch import DwdpLaunch, RankSpan, Seat
from vllm_dwdp.distributed.meeting import make_abstract_endpoint
from vllm_dwdp.executor import identity, source

LAUNCH = DwdpLaunch(
    config=DwdpConfig(group_size=2),
    ranks=RankSpan(0, 2, 2),
    endpoint=make_abstract_endpoint(),
    tensor_parallel_size=2,
)


def fingerprint_of(
    model: str, load_format: str = "auto", seat: Seat = LAUNCH.seats[0], **config: Any
) -> Fingerprint:
    commit = config.pop("commit", None)
    content = {"_name_or_path": model, "text_config": {"_name_or_path": model}, **config}
    hf_config = SimpleNamespace(to_json_string=lambda use_diff: json.dumps(content))
    if commit is not None:
        hf_config._commit_hash = commit
    model_config = SimpleNamespace(
        model=model, revision=None, hf_config=hf_config, dtype="bf16", quantization=None, seed=0
    )
    vllm_config = SimpleNamespace(
        model_config=model_config, load_config=SimpleNamespace(load_format=load_format)
    )
    return identity.make_fingerprint(seat, vllm_config, 4096)


def folder_with(folder: Path, content: bytes, name: str = "model.safetensors") -> str:
    folder.mkdir()
    (folder / name).write_bytes(content)
    return str(folder)


def test_the_same_checkpoint_in_two_places_is_the_same(tmp_path: Path) -> None:
    here = fingerprint_of(folder_with(tmp_path / "here", b"weights"), hidden_size=8)
    there = fingerprint_of(folder_with(tmp_path / "there", b"weights"), hidden_size=8)
    assert here.model != there.model
    assert here.differences(there) == {}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf"])
def test_other_weights_or_another_config_are_not(name: str, tmp_path: Path) -> None:
    first = fingerprint_of(folder_with(tmp_path / "a", b"weights", name), hidden_size=8)
    other = fingerprint_of(folder_with(tmp_path / "b", b"weightz", name), hidden_size=8)
    assert set(first.differences(other)) == {"checkpoint_digest"}
    config = fingerprint_of(str(tmp_path / "a"), hidden_size=16)
    assert set(first.differences(config)) == {"config_digest"}


def test_equal_content_may_have_another_revision_and_what_cannot_be_compared_may_not() -> None:
    """As where the group has reloaded a path, and a rank starts with `--revision` and a copy."""
    named = replace(fingerprint_of("org/model", commit="1a"), revision="v1")
    assert named.differences(replace(named, revision="None", model="/copy")) == {}
    unknown = replace(named, checkpoint_digest="unknown")
    assert set(unknown.differences(replace(unknown, revision="v2"))) == {"revision"}


def test_only_workers_of_one_tensor_rank_have_the_same() -> None:
    first, second, peer, _ = (
        fingerprint_of("org/model", seat=seat, commit="1a") for seat in LAUNCH.seats
    )
    assert first.differences(peer) == {}
    assert first.differences(second) == {"tensor_slice": ("0 of 2", "1 of 2")}


def test_two_commits_of_a_name_on_a_hub_differ() -> None:
    first, second = (fingerprint_of("org/model", commit=commit) for commit in ("1a", "2b"))
    assert first.differences(second) == {"checkpoint_digest": ("commit 1a", "commit 2b")}


def test_content_that_nobody_can_compare_is_said(caplog: pytest.LogCaptureFixture) -> None:
    source.logger.addHandler(caplog.handler)
    assert fingerprint_of("s3://bucket/model").checkpoint_digest == "unknown"
    source.logger.removeHandler(caplog.handler)
    assert "s3://bucket/model cannot be compared between ranks" in caplog.text


def test_dummy_weights_are_their_seed() -> None:
    assert fingerprint_of("org/model", load_format="dummy").checkpoint_digest == "dummy-0"

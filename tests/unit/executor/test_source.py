"""Which checkpoint a rank reads that starts in a group whose weights were renewed."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.distributed.test_messages import fingerprint
from tests.unit.executor.test_identity import folder_with
from vllm_dwdp.distributed.fingerprint import Fingerprint
from vllm_dwdp.executor import source
from vllm_dwdp.executor.source import (
    Source,
    first_source,
    follow_revision,
    reloaded_source,
    take_over,
)


def config_of(model: str, load_format: str = "auto", cache: Path | None = None) -> Any:
    model_config = SimpleNamespace(
        model=model,
        revision="main",
        model_weights="s3://bucket",
        hf_config=SimpleNamespace(),
        seed=0,
    )
    load_config = SimpleNamespace(load_format=load_format, download_dir=cache and str(cache))
    return SimpleNamespace(model_config=model_config, load_config=load_config)


def read_from(vllm_config: Any) -> tuple[str, str | None, str]:
    """Return what vLLM would load."""
    model = vllm_config.model_config
    return model.model, model.revision, model.model_weights


@pytest.fixture
def first(tmp_path: Path) -> str:
    return folder_with(tmp_path / "first", b"first")


def served_from(place: str) -> Fingerprint:
    """Return what a rank says it serves that was told to read `place`."""
    vllm_config = config_of(place)
    vllm_config.model_config.revision = None
    found = reloaded_source(vllm_config)
    return fingerprint(
        model=found.model, revision=found.revision, checkpoint_digest=found.checkpoint_digest
    )


def test_a_relative_path_is_told_so_that_others_find_it(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latest").symlink_to("first")
    monkeypatch.chdir(tmp_path)
    assert served_from("latest").model == first
    assert first_source(config_of(os.path.relpath(first))).model == first


def test_the_checkpoint_of_the_group_is_read_in_place_of_the_first(
    first: str, tmp_path: Path
) -> None:
    served = served_from(folder_with(tmp_path / "second", b"second"))
    vllm_config = config_of(first)
    assert take_over(vllm_config, served) == Source(
        model=served.model, revision="None", checkpoint_digest=served.checkpoint_digest
    )
    assert read_from(vllm_config) == (served.model, None, "")


@pytest.mark.parametrize("how", ["missing", "another", "unreadable"])
def test_what_is_not_there_is_not_read_and_named(
    how: str, first: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "second"
    served = served_from(folder_with(place, b"second"))
    (file,) = place.iterdir()
    if how == "missing":
        file.unlink()
    elif how == "another":
        file.write_bytes(b"third!")
    else:
        file.unlink()
        file.mkdir()  # which not even root can read
    vllm_config = config_of(first)
    source.logger.addHandler(caplog.handler)
    assert take_over(vllm_config, served) is None
    source.logger.removeHandler(caplog.handler)
    assert read_from(vllm_config) == (first, "main", "s3://bucket")
    said = {
        "missing": "there are no weights here at that place",
        "another": f" here and {served.checkpoint_digest[:19]!r} there",
        "unreadable": "it cannot be read here: ",
    }
    assert f"the group serves {place} since its weights were renewed" in caplog.text
    assert said[how] in caplog.text and f"This rank tries {first}" in caplog.text


def test_of_a_name_on_a_hub_that_commit_is_read_that_the_group_has(tmp_path: Path) -> None:
    """What the cache got last is what was reloaded, whatever the first config says of its commit."""
    commit = "c" * 40
    cached = tmp_path / "models--org--second"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    vllm_config = config_of("org/second", cache=tmp_path)
    vllm_config.model_config.revision = None
    vllm_config.model_config.hf_config._commit_hash = "f" * 40
    assert first_source(vllm_config).checkpoint_digest == "commit " + "f" * 40
    found = reloaded_source(vllm_config)
    assert found == Source(
        model="org/second", revision="None", checkpoint_digest=f"commit {commit}"
    )
    served = fingerprint(
        model="org/second", revision="None", checkpoint_digest=found.checkpoint_digest
    )
    returning = config_of("org/first")
    assert take_over(returning, served) == found
    assert read_from(returning) == ("org/second", commit, "")
    follow_revision(returning, served)
    assert read_from(returning) == ("org/second", None, ""), "a reload reads what the others read"
    elsewhere = config_of("org/second", cache=tmp_path / "empty")
    assert reloaded_source(elsewhere).checkpoint_digest == "unknown"


def test_dummy_weights_stay_dummy_weights(first: str) -> None:
    vllm_config = config_of("org/model", load_format="dummy")
    assert take_over(vllm_config, served_from(first)) is None
    assert first_source(vllm_config).checkpoint_digest == "dummy-0"

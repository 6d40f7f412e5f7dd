"""How long a launch gives its ranks."""

from pathlib import Path

import pytest

from vllm_dwdp.entrypoints.launch.deadlines import (
    default_start_timeout_s,
    model_bytes,
    shutdown_timeout_s,
)
from vllm_dwdp.errors import DwdpConfigError


def write(file: Path, num_bytes: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as sparse:
        sparse.truncate(num_bytes)
    return file


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path / "hf" / "hub"


def test_a_start_has_ten_seconds_for_each_gb_beside_the_wait_for_peers(tmp_path: Path) -> None:
    write(tmp_path / "m" / "a.safetensors", 30 * 10**9)
    write(tmp_path / "m" / "sub" / "b.bin", 10**9)
    write(tmp_path / "m" / "tokenizer.json", 10**9)
    assert default_start_timeout_s(str(tmp_path / "m"), 600.0) == 600 + 60 + 310
    assert default_start_timeout_s(str(tmp_path / "m" / "a.safetensors"), 60.0) == 60 + 60 + 300


def test_a_model_of_the_hub_is_measured_where_it_was_downloaded(
    no_hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert model_bytes("org/name") is None
    assert default_start_timeout_s("org/name", 600.0) == 600 + 60 + 7200
    blob = write(no_hub / "models--org--name" / "blobs" / "1", 5)
    for revision in ("a", "b"):
        link = no_hub / "models--org--name" / "snapshots" / revision / "w.safetensors"
        link.parent.mkdir(parents=True)
        link.symlink_to(blob)
    assert model_bytes("org/name") == 5, "two revisions, one file"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert model_bytes("org/name") is None
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    write(tmp_path / "xdg/huggingface/hub/models--m/w.gguf", 7)
    assert model_bytes("m") == 7


def test_a_folder_without_weights_may_be_filled_later(tmp_path: Path) -> None:
    assert model_bytes(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        ([], 0),
        (["--shutdown-timeout", "60"], 60),
        (["--shutdown_timeout=7", "--seed", "1"], 7),
        (["--shutdown-timeout", "60", "--shutdown-timeout=5"], 5),
        (["--shut", "5"], 5),
        (["--sh", "5", "--shape", "5", "--seed", "--served-model-name", "m"], 0),
    ],
)
def test_the_time_to_finish_running_requests(arguments: list[str], seconds: float) -> None:
    assert shutdown_timeout_s(arguments) == seconds


@pytest.mark.parametrize("arguments", [["--shutdown-timeout", "-1"], ["--shutdown-timeout"]])
def test_a_time_that_is_none_is_refused(arguments: list[str]) -> None:
    with pytest.raises(DwdpConfigError, match="--shutdown-timeout '.*' must be a whole number"):
        shutdown_timeout_s(arguments)

"""What tests of launch share."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.entrypoints.launch.fakes import use_fakes
from vllm_dwdp.entrypoints.launch.plan import LaunchPlan


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LaunchPlan:
    return use_fakes(tmp_path, monkeypatch.setattr)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Return what says of decode servers what they are."""
    file = tmp_path / "decode.json"
    monkeypatch.setenv("DWDP_ADMISSION_FILE", str(file))
    return lambda said: file.write_text(json.dumps(said))

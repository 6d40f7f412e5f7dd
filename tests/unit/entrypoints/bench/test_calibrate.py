"""What `vllm-dwdp calibrate` writes, and what it refuses to."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.planner.models import MIXTRAL_8X7B
from vllm_dwdp.entrypoints.bench.calibrate import ENTRY, entry, products_per_s
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.hardware import find_hardware
from vllm_dwdp.planner.model_shape import shape_of


@pytest.mark.parametrize("name", ['a"b.toml', "a\\b.toml", "a\nb.toml", "a b.toml", "a\x7f.toml"])
def test_a_calibration_is_toml_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.toml"
    figures_ = dict.fromkeys(
        ("gemm", "memory_gb", "read", "copy", "attention", "products", "short", "long", "fixed"),
        0.5,
    )
    path.write_text(
        entry(f"vllm-dwdp calibrate '{name}'", Path(name), machine="m", direct=1, **figures_)
    )
    assert find_hardware(ENTRY, path).efficiency.origin() == "calibrated"


@pytest.mark.parametrize("old", [False, True])
def test_a_calibration_that_cannot_be_written_is_refused_at_once(old: bool) -> None:
    """Also by the flag that the command has replaced, which names it."""
    program = [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main"]
    words = ("bench", "--calibrate") if old else ("calibrate",)
    ended = subprocess.run(
        [*program, *words, "/nowhere/c.toml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    *notices, refusal = ended.stderr.splitlines()
    assert ended.returncode == 2
    assert refusal.startswith("vllm-dwdp: calibrate /nowhere/c.toml cannot be written")
    assert [notice.split(";")[0] for notice in notices] == (
        ["bench --calibrate is now vllm-dwdp calibrate"] if old else []
    )


@pytest.mark.parametrize("seconds", [-0.1, 0.0, 1e-9])
def test_a_disturbed_calibration_writes_no_entry_that_plan_would_refuse(seconds: float) -> None:
    shape = shape_of(MIXTRAL_8X7B)
    assert products_per_s(shape, 1e3, attention_tflops=1.0) > 0
    with pytest.raises(DwdpConfigError, match="measure again when the machine is idle"):
        products_per_s(shape, seconds, attention_tflops=1.0)

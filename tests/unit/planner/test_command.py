"""`vllm-dwdp plan`: its answer, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.planner.models import (
    run_plan,
)
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.paper import DEEPSEEK_R1
from vllm_dwdp.planner.model_shape import shape_of


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    common = ("--model", str(tmp_path), "--gpu", "gb200", "--expert-dtype", "nvfp4")
    answer = json.loads(run_plan(*common, "--json").stdout)
    assert {"topic", "quantity", "low", "high", "unit", "origin", "reason"} == set(
        answer["lines"][0]
    )
    shown = run_plan(*common).stdout
    assert "break-even tokens" in shown
    assert "default" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--gpu": "tpu"}, "--gpu 'tpu' is unknown; known are b200"),
        ({"--model": "/nowhere"}, "--model /nowhere"),
        ({"--expert-dtype": "int3"}, "--expert-dtype 'int3' is unknown"),
        (
            {"--variation": "-1"},
            "--variation is -1.0; it must be a number of at least 0 and at most 1.",
        ),
        ({"--kv-dtype": "fp3"}, "--kv-dtype 'fp3' is unknown"),
        ({"--ranks": "1"}, "--ranks is 1; it must be a whole number of at least 2."),
        (
            {"--experts-per-rank": "500"},
            "--experts-per-rank is 500; it must be a whole number from 64 to 256.",
        ),
        (
            {"--max-num-batched-tokens": "0"},
            "--max-num-batched-tokens is 0; it must be a whole",
        ),
        ({"--batch-size": "-3"}, "--batch-size is -3; it must be a whole number of at least 1."),
        ({"--hardware": "/nowhere.toml"}, "--hardware /nowhere.toml"),
        ({"--png": "/nowhere/plan.png"}, "--png /nowhere/plan.png cannot be written"),
        ({"--png": "/proc"}, "--png /proc cannot be written"),
        ({"--input-tokens": "0"}, "--input-tokens is 0; it must be a whole number of at least 1."),
        (
            {"--output-tokens": "-5"},
            "--output-tokens is -5; it must be a whole number of at least 0.",
        ),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    options = {"--model": str(tmp_path), "--gpu": "gb200"} | changes
    ended = run_plan(*(part for pair in options.items() for part in pair))
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"vllm-dwdp: {message}")
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size in config.json is 0; it must be a whole number of at"),
        ({"num_experts_per_tok": 300}, "routes a token to 300 of 256 experts"),
        ({"first_k_dense_replace": 61}, "leaves no layer with experts"),
        ({"vocab_size": None}, "config.json has no vocab_size"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DwdpConfigError, match=message):
        shape_of(DEEPSEEK_R1 | change)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "model_type": "llama"}))
    ended = run_plan("--model", str(tmp_path), "--gpu", "h100")
    assert ended.returncode == 2
    assert "has no routed experts" in ended.stderr

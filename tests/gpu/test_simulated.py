"""The GPU programs over the fake driver and CPU kernels: that they run, not what a GPU would do."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.running import run_scenario
from vllm_dwdp.testing.accelerator import simulated_environment

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(200)]


@pytest.mark.parametrize(
    ("scenario", "argument"),
    [
        ("views", "2"),
        ("failed_set_up", ""),
        ("moe_outputs", "piecewise"),
        ("mixed_modes", "1"),
        ("a_rank_is_killed", ""),
    ],
)
def test_scenarios_run(scenario: str, argument: str) -> None:
    passed, output = run_scenario(scenario, argument, simulated_environment())
    assert passed, output[-4000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's interpreter")
def test_the_gather_kernel_fetches_what_is_routed() -> None:
    environment = simulated_environment() | {"TRITON_INTERPRET": "1"}
    passed, output = run_scenario("gather", "", environment)
    assert passed, output[-4000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_gather_kernel_compiles_for_hopper_with_wide_accesses(tmp_path: Path) -> None:
    program = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.expert_gather import _gather_chunks

source = ASTSource(
    fn=_gather_chunks,
    signature={
        "anchor": "*i32",
        "chunks": "*i64",
        "routed": "*i32",
        "CHUNK_WORDS": "constexpr",
        "BLOCK": "constexpr",
    },
    constexprs={"CHUNK_WORDS": 16384, "BLOCK": 2048},
    attrs={(argument,): [["tt.divisibility", 16]] for argument in range(3)},
)
ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, ptx
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_benchmark_runs_and_its_ring_gives_the_bits_of_resident_weights(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    command = [sys.executable, "benchmarks/bench_gpu.py", "--json", str(target), "--tokens", "5"]
    result = subprocess.run(
        [*command, "--cases", "qwen3-30b-a3b bf16 host"],
        cwd=ROOT,
        env=simulated_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (row,) = json.loads(target.read_text())["rows"]
    assert all(row["same"].values()) and "NOT A GPU" in result.stdout
    ways = {"resident", "prefetch", "merge", "join"}
    assert {name.split()[0] for name in row["ms"]} == ways


def test_the_first_minutes_ask_their_questions(tmp_path: Path) -> None:
    names = ["which_device", "read_only_peer", "batch_copy_under_capture"]
    result = subprocess.run(
        [sys.executable, "scripts/gpu_first_minutes.py", "--only", *names, "--jobs", "2"],
        cwd=ROOT,
        env=simulated_environment() | {"OUT": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    answers = json.loads((tmp_path / "first_minutes.json").read_text())
    assert {answer["name"] for answer in answers} == set(names)
    assert "NOT A GPU" in answers[0]["text"]
    texts = {answer["name"]: answer["text"] for answer in answers}
    assert "returned 900" in texts["batch_copy_under_capture"]
    assert "ILLEGAL_ADDRESS" in texts["read_only_peer"]

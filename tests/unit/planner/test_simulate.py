"""The simulator: deterministic, fast, and right where the answer is known."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.planner.test_planner import r1_on_gb200
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.cost import Step
from vllm_dwdp.planner.hardware import DEFAULT
from vllm_dwdp.planner.paper import DEEPSEEK_R1, paper_rows
from vllm_dwdp.planner.simulate import (
    Request,
    contention_factor,
    poisson_traffic,
    read_trace,
    simulate_dep,
    simulate_dwdp,
)


def test_one_prompt_takes_its_layers() -> None:
    model = r1_on_gb200(efficiency=DEFAULT)
    prompt = [Request(arrival_s=3.0, input_tokens=8192)]
    step = Step.prefill(8192, 8192)
    layers = model.shape.num_moe_layers
    alone = simulate_dwdp(model, prompt, max_tokens=16384)
    assert alone.ttft_s == (pytest.approx(layers * model.dwdp_layer(step)),)
    together = simulate_dep(model, prompt, max_tokens=16384)
    assert together.ttft_s[0] < layers * model.dep_layer(step), "three ranks had nothing to route"


def test_a_long_prompt_holds_up_everybody_under_dep_and_nobody_under_dwdp() -> None:
    model = r1_on_gb200(efficiency=DEFAULT)
    lengths = [32768, 1024, 1024, 1024]
    prompts = [Request(arrival_s=0.0, input_tokens=length) for length in lengths]
    independent = sorted(simulate_dwdp(model, prompts, max_tokens=32768).ttft_s)
    lockstep = sorted(simulate_dep(model, prompts, max_tokens=32768).ttft_s)
    assert independent[0] < 0.5 * independent[-1]
    assert lockstep[0] == lockstep[-1]


def test_the_same_seed_gives_the_same_answer() -> None:
    def run(seed: int) -> tuple[float, ...]:
        traffic = poisson_traffic(
            num_requests=200, requests_per_s=20, input_tokens=4096, smallest_share=0.5, seed=seed
        )
        return simulate_dwdp(r1_on_gb200(), traffic, max_tokens=8192).ttft_s

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert contention_factor(8, slices_per_peer=2) == contention_factor(8, slices_per_peer=2)


def test_contention_slows_pulls_and_slices_help() -> None:
    whole = contention_factor(8, slices_per_peer=1)
    sliced = contention_factor(8, slices_per_peer=8)
    assert 1.0 <= sliced < whole < 3.0
    assert contention_factor(2, slices_per_peer=1) == 1.0


@pytest.mark.timeout(60)
def test_72_ranks_and_10000_steps_within_a_minute() -> None:
    model = r1_on_gb200(efficiency=DEFAULT, group_size=72)
    traffic = poisson_traffic(
        num_requests=720_000, requests_per_s=1e9, input_tokens=32768, smallest_share=0.8, seed=0
    )
    started = time.monotonic()
    outcome = simulate_dwdp(model, traffic, max_tokens=32768)
    assert outcome.num_steps >= 720_000
    assert time.monotonic() - started < 60


def test_the_paper_rows_are_honest() -> None:
    rows = paper_rows()
    predicted = [row for row in rows if row.kind == "predicted"]
    assert len(predicted) >= 30
    assert all(abs(row.error) <= 0.05 for row in predicted)
    assert {row.kind for row in rows} == {"predicted", "default"}
    assert all(abs(row.error) < 0.2 for row in rows)


@pytest.mark.parametrize(
    "line", ["nonsense", "{}", '{"arrival_s": -1, "input_tokens": 5}', '{"arrival_s": 1}', "[1]"]
)
def test_a_broken_trace_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f'{{"arrival_s": 0.5, "input_tokens": 7}}\n{line}\n')
    with pytest.raises(DwdpConfigError, match="line 2"):
        read_trace(path)


def test_the_command(tmp_path: Path) -> None:
    config, trace = tmp_path / "config.json", tmp_path / "trace.jsonl"
    config.write_text(json.dumps(DEEPSEEK_R1))
    trace.write_text('{"arrival_s": 0.0, "input_tokens": 900}\n')
    command = [sys.executable, "-m", "vllm_dwdp.entrypoints.cli", "simulate"]
    common = ["--model", str(config), "--trace", str(trace), "--json"]
    ended = subprocess.run(
        [*command, *common], capture_output=True, text=True, check=True, timeout=60
    )
    rows = json.loads(ended.stdout)["rows"]
    assert [row["deployment"] for row in rows] == ["DEP", "DWDP"]
    ended = subprocess.run(
        [*command, "--paper", "--json"], capture_output=True, text=True, check=True, timeout=120
    )
    assert set(json.loads(ended.stdout)["rows"][0]) == {
        "source",
        "quantity",
        "published",
        "model",
        "kind",
    }
    bad = subprocess.run(
        [*command, "--model", str(config), "--rate", "-1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert bad.returncode == 2
    assert bad.stderr.strip() == "vllm-dwdp: --rate -1.0 must be positive."

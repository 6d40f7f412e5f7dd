"""The simulator: deterministic, fast, and right where the answer is known."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.planner.models import r1_on_gb200
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.paper import DEEPSEEK_R1
from vllm_dwdp.planner.contention import (
    PullOrder,
    Pulls,
    contended_layer,
    contention,
    layer_time,
)
from vllm_dwdp.planner.disaggregated import Service, decode_batch, end_to_end_gain
from vllm_dwdp.planner.hardware import DEFAULT
from vllm_dwdp.planner.simulate import (
    Chunk,
    default_pulls,
    dwdp_step,
    simulate_dep,
    simulate_dwdp,
    step_of,
)
from vllm_dwdp.planner.step import Step
from vllm_dwdp.planner.traffic import Request, poisson_traffic, read_trace


def test_one_prompt_takes_its_layers() -> None:
    model = r1_on_gb200(efficiency=DEFAULT)
    prompt = [Request(arrival_s=3.0, input_tokens=8192)]
    step = Step.prefill(8192, 8192)
    layers, dense = model.shape.num_moe_layers, model.dense_layers(step).compute
    alone = simulate_dwdp(model, prompt, max_tokens=16384)
    assert alone.ttft_s == (pytest.approx(model.dwdp_step(step), rel=0.02),)
    together = simulate_dep(model, prompt, max_tokens=16384)
    assert together.ttft_s[0] < layers * model.dep_layer(step) + dense, "three had nothing to route"
    assert together.busy == pytest.approx(1)


def test_a_long_prompt_holds_up_everybody_under_dep_and_nobody_under_dwdp() -> None:
    model = r1_on_gb200(efficiency=DEFAULT)
    lengths = [32768, 1024, 1024, 1024]
    prompts = [Request(arrival_s=0.0, input_tokens=length) for length in lengths]
    independent = sorted(simulate_dwdp(model, prompts, max_tokens=32768).ttft_s)
    lockstep = sorted(simulate_dep(model, prompts, max_tokens=32768).ttft_s)
    assert independent[0] < 0.5 * independent[-1]
    assert lockstep[0] == lockstep[-1]


def test_steps_are_filled_by_cutting_prompts() -> None:
    """Three prompts of 6,144 tokens are two steps of 8,192 and one of the rest, not three."""
    model = r1_on_gb200(efficiency=DEFAULT)
    prompts = [
        Request(arrival_s=0.0, input_tokens=6144 if index % 4 == 0 else 1) for index in range(12)
    ]
    outcome = simulate_dwdp(model, prompts, max_tokens=8192, pulls=default_pulls(model))
    chunks = [Chunk(prompts[0], 0, 6144), Chunk(prompts[4], 0, 2048)]
    step = step_of(chunks)
    assert (step.num_tokens, step.mean_keys) == (8192, (6144**2 + 2048**2) / 2 / 8192)
    rest = step_of([Chunk(prompts[4], 2048, 6144)])
    assert rest.mean_keys == 4096, "later tokens of a prompt attend to the earlier ones"
    first = dwdp_step(model, step, default_pulls(model))
    second = dwdp_step(
        model,
        step_of([Chunk(prompts[4], 2048, 6144), Chunk(prompts[8], 0, 4096)]),
        default_pulls(model),
    )
    third = dwdp_step(model, step_of([Chunk(prompts[8], 4096, 6144)]), default_pulls(model))
    long_ones = sorted(outcome.ttft_s)[-3:]
    assert long_ones == pytest.approx([first, first + second, first + second + third])


def test_the_same_seed_gives_the_same_answer() -> None:
    def run(seed: int) -> tuple[float, ...]:
        traffic = poisson_traffic(
            num_requests=200, requests_per_s=20, input_tokens=4096, smallest_share=0.5, seed=seed
        )
        return simulate_dwdp(r1_on_gb200(), traffic, max_tokens=8192).ttft_s

    assert run(1) == run(1)
    assert run(1) != run(2)
    pulls = Pulls(group_size=8, slices_per_peer=2)
    assert layer_time.__wrapped__(pulls, 1.1) == layer_time.__wrapped__(pulls, 1.1)


@pytest.mark.parametrize("group_size", [2, 4, 16, 72])
def test_some_number_of_pulls_meets_at_a_source(group_size: int) -> None:
    assert sum(contention(group_size)) == pytest.approx(1)


def test_contention_slows_layers_and_slices_help() -> None:
    """Of layers whose compute is 1.2 times a pull: whole shares expose copies, slices hardly any."""

    def slowdown(**how: Any) -> float:
        return layer_time(Pulls(group_size=8, **how), 1.2) / 1.2

    whole = slowdown(slices_per_peer=1, in_flight=1)
    random = slowdown(slices_per_peer=1, in_flight=1, order=PullOrder.RANDOM)
    assert 0.99 < slowdown(slices_per_peer=8) < 1.01 < whole < random < 1.5
    assert layer_time(Pulls(group_size=2, slices_per_peer=1), 0.5) == 1.0


@pytest.mark.parametrize("ratio", [0.1, 0.6, 1.05, 1.7, 5.0])
def test_a_layer_is_never_faster_than_its_parts(ratio: float) -> None:
    pulls = Pulls(group_size=4, slices_per_peer=4)
    seconds = contended_layer(pulls, ratio, 1.0)
    assert max(ratio, 0.98) <= seconds < 1.1 * max(ratio, 1.0)
    assert contended_layer(pulls, ratio, 0.0) == ratio


def test_long_steps_hide_their_copies_and_short_ones_do_not() -> None:
    model = r1_on_gb200(efficiency=DEFAULT)
    short, long = (Step.prefill(tokens, 8192) for tokens in (1024, 32768))
    pulls = default_pulls(model)
    layers = model.shape.num_moe_layers
    assert dwdp_step(model, short, pulls) >= layers * model.prefetch
    hidden = model.step_seconds(long).compute + layers * model.interference
    assert dwdp_step(model, long, pulls) == pytest.approx(hidden, rel=0.02)


def test_end_to_end_gains_less_than_the_context_servers() -> None:
    model = r1_on_gb200(efficiency=DEFAULT)
    gains = [
        end_to_end_gain(
            model, Service(input_tokens=8192, output_tokens=1024, tokens_per_user=rate), 2e4, 1.1
        )
        for rate in (25, 100, 200)
    ]
    assert 1.1 > gains[0] > gains[1] > gains[2] > 1.0
    impossible = Service(input_tokens=8192, output_tokens=1024, tokens_per_user=1e6)
    assert decode_batch(model, impossible).size < 0.01


@pytest.mark.timeout(240)
def test_72_ranks_and_10000_steps_within_a_minute() -> None:
    """Of this process's own time: what else the machine does is not the simulator's."""
    model = r1_on_gb200(efficiency=DEFAULT, group_size=72)
    traffic = poisson_traffic(
        num_requests=810_000, requests_per_s=1e9, input_tokens=32768, smallest_share=0.8, seed=0
    )
    started = time.process_time()
    outcome = simulate_dwdp(model, traffic, max_tokens=32768)
    assert outcome.num_steps >= 720_000
    assert time.process_time() - started < 60


@pytest.mark.parametrize(
    "line", ["nonsense", "{}", '{"arrival_s": -1, "input_tokens": 5}', '{"arrival_s": 1}', "[1]"]
)
def test_a_broken_trace_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f'{{"arrival_s": 0.5, "input_tokens": 7}}\n{line}\n')
    with pytest.raises(DwdpConfigError, match="line 2"):
        read_trace(path)


def test_a_trace_counts_from_its_first_request(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = ('{"arrival_s": 1.7e9, "input_tokens": 7, "note": "a\u2028b"}', "  ", "",
             '{"arrival_s": 1700000002, "input_tokens": 9}\r')  # fmt: skip
    path.write_text("\n".join(lines), newline="")
    found = read_trace(path)
    assert [(r.arrival_s, r.input_tokens) for r in found] == [(0.0, 7), (2.0, 9)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"COLUMNS": "160"},
    )


def test_the_command(tmp_path: Path) -> None:
    config, trace = tmp_path / "config.json", tmp_path / "trace.jsonl"
    config.write_text(json.dumps(DEEPSEEK_R1))
    trace.write_text('{"arrival_s": 0.0, "input_tokens": 900}\n')
    ended = run("simulate", "--model", str(config), "--trace", str(trace), "--json")
    rows = json.loads(ended.stdout)["rows"]
    assert [row["deployment"] for row in rows] == ["DEP", "DWDP"]
    assert all(row["output_tokens_per_s_per_gpu_always_busy"] > 0 for row in rows)
    assert "TTFT P99" in run("simulate", "--model", str(config), "--requests", "9").stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--rate": "-1"}, "--rate is -1.0; it must be a number above 0."),
        ({"--rate": "nan"}, "--rate is nan; it must be a number"),
        ({"--requests": "0"}, "--requests is 0; it must be a whole number of at least 1."),
        (
            {"--smallest-share": "2"},
            "--smallest-share is 2.0; it must be a number above 0",
        ),
        ({"--ranks": "1"}, "--ranks is 1; it must be a whole number of at least 2."),
        ({"--routing-skew": "0.5"}, "--routing-skew is 0.5; it must be a number of at least 1."),
        (
            {"--max-num-batched-tokens": "0"},
            "--max-num-batched-tokens is 0; it must be a whole",
        ),
        ({"--pull-order": "sideways"}, "--pull-order 'sideways' is unknown"),
        ({"--slice-mib": "-2"}, "--slice-mib is -2.0; it must be a number above 0."),
        ({"--tokens-per-user": "0"}, "--tokens-per-user is 0.0; it must be a number above 0"),
        ({"--output-tokens": "0"}, "--output-tokens is 0; it must be a number of at least 1"),
        ({"--trace": "/nowhere.jsonl"}, "--trace /nowhere.jsonl"),
        ({"--gpu": "abacus"}, "--gpu 'abacus' is unknown"),
        ({"--png": "/nowhere/s.png"}, "--png /nowhere/s.png cannot be written"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    options = {"--model": str(tmp_path)} | changes
    ended = run("simulate", *(part for pair in options.items() for part in pair))
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"vllm-dwdp: {message}")
    assert len(ended.stderr.strip().splitlines()) == 1


def test_a_model_is_needed() -> None:
    ended = run("simulate")
    assert ended.returncode == 2
    assert ended.stderr.startswith("vllm-dwdp: --model is missing")

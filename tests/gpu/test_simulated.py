"""The GPU programs over the fake driver and CPU kernels: that they run, not what a GPU would do.

One argument of every scenario that needs no engine; the others are in `tests/e2e/test_gpu_programs.py`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_checks.accelerator import simulated_environment
from tests.gpu import __main__ as runner
from tests.gpu.kv_sizing import MIB, SHARING, check_sizing
from tests.gpu.returning import check_memory
from tests.gpu.running import VLLM, Outcome, run_scenario
from tests.gpu.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(200)]

WITHOUT_ENGINE = [name for name in SCENARIOS if name not in (*VLLM, "gather")]


@pytest.mark.parametrize("scenario", WITHOUT_ENGINE)
def test_scenarios_run(scenario: str) -> None:
    outcome = run_scenario(scenario, SCENARIOS[scenario][0], simulated_environment())
    assert outcome.passed, outcome.output[-4000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's interpreter")
def test_the_gather_kernel_fetches_what_is_routed() -> None:
    environment = simulated_environment() | {"TRITON_INTERPRET": "1"}
    outcome = run_scenario("gather", "", environment)
    assert outcome.passed, outcome.output[-4000:]


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
@pytest.mark.parametrize("case", ["qwen3-30b-a3b bf16", "qwen3-30b-a3b bf16 host"])
def test_the_benchmark_runs_and_its_ring_gives_the_bits_of_resident_weights(
    case: str, tmp_path: Path
) -> None:
    target = tmp_path / "bench.json"
    command = [sys.executable, "benchmarks/bench_gpu.py", "--json", str(target), "--tokens", "5"]
    result = subprocess.run(
        [*command, "--cases", case],
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
    assert row["copies"]["bytes"] > 0 and row["host_us"]["slices"] > 0, "nothing was fetched"
    assert row["host_us"]["issue"] > 0
    assert "2 MiB slices" in result.stdout


def ask(tmp_path: Path, *names: str, timeout_s: int = 75, **settings: object) -> dict[str, dict]:
    """The answers of the first minutes to some questions, by name."""
    result = subprocess.run(
        [sys.executable, "scripts/gpu_first_minutes.py", "--jobs", "2"]
        + ["--timeout-s", str(timeout_s), "--only", *names],
        cwd=ROOT,
        env=simulated_environment(**settings) | {"OUT": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    answers = json.loads((tmp_path / "first_minutes.json").read_text())
    assert {answer["name"] for answer in answers} == set(names)
    return {answer["name"]: answer for answer in answers}


def test_the_first_minutes_ask_their_questions(tmp_path: Path) -> None:
    answers = ask(tmp_path, "which_device", "read_only_peer", "batch_copy_under_capture")
    assert "NOT A GPU" in answers["which_device"]["text"]
    assert "returned 900" in answers["batch_copy_under_capture"]["text"]
    assert "ILLEGAL_ADDRESS" in answers["read_only_peer"]["text"]


def test_external_nodes_that_look_at_the_launch_are_told_and_keep_the_order(tmp_path: Path) -> None:
    answers = ask(tmp_path, "external_waits", "external_order", event_nodes="launch")
    assert all(answer["good"] is None for answer in answers.values())
    assert answers["external_waits"]["text"].startswith("when the graph is launched")
    assert answers["external_order"]["text"].startswith("yes")


def test_external_nodes_that_look_when_they_run_are_told_and_their_hang_is_a_fact(
    tmp_path: Path,
) -> None:
    waits = ask(tmp_path, "external_waits", event_nodes="run")["external_waits"]
    order = ask(tmp_path, "external_order", timeout_s=8, event_nodes="run")["external_order"]
    assert waits["good"] is None and waits["text"].startswith("when it runs")
    assert order["good"] is None and order["text"] == "no answer in 8 s; it hangs"


def outcomes(monkeypatch: pytest.MonkeyPatch, ends: dict[str, Outcome]) -> None:
    """Let scenarios end as given, and otherwise well."""
    monkeypatch.setattr(runner, "why_not", lambda scenario: "")
    well = Outcome(passed=True, timed_out=False, output="ok")
    monkeypatch.setattr(runner, "run_scenario", lambda name, *_, **__: ends.get(name, well))


@pytest.mark.parametrize(
    ("arguments", "ends", "status", "said"),
    [
        (["--only", "views:2", "leaks"], {}, 0, "2 ok"),
        (["--only", "views", "--skip", "views:3"], {}, 0, "2 ok"),
        (["--only", "leaks"], {"leaks": (False, False)}, 1, "FAIL: leaks"),
        (["--only", "leaks", "views:2", "--budget-s", "10"], {}, 1, "NOT RUN: leaks views:2"),
        (["--only", "leaks", "external_nodes"], {"external_nodes": (False, True)}, 0, "hangs"),
    ],
)
def test_the_runner_takes_nothing_for_passed_that_was_not_run(
    arguments: list[str],
    ends: dict[str, tuple[bool, bool]],
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = {
        name: Outcome(passed=passed, timed_out=timed_out, output="...")
        for name, (passed, timed_out) in ends.items()
    }
    outcomes(monkeypatch, made)
    monkeypatch.setattr(sys, "argv", ["tests.gpu", *arguments])
    monkeypatch.delenv("OUT", raising=False)
    assert runner.main() == status
    assert said in capsys.readouterr().out


def made_up_sizes(*, sees_experts: bool) -> dict[str, list[dict[str, int]]]:
    """What a vLLM that sees shards and slots would find, or one that does not, in MiB."""
    found = {}
    for name, dwdp in SHARING.items():
        shard = 768 * dwdp.get("experts_per_rank", 4) // 4
        slots = 192 if dwdp["mode"] == "prefetch" else 0
        own = 600 + (shard + slots if sees_experts else 0)
        consumed, budget, free = 2 * own, 12_000, 70_000
        cache = budget - consumed - 100
        each = {"free_at_start": free, "budget": budget, "consumed": consumed, "cache": cache}
        each |= {"shard": shard, "slots": slots, "free": free - 2 * (600 + shard + slots + cache)}
        found[name] = [{key: value * MIB for key, value in each.items()}] * 2
    return found


def test_kv_sizing_that_misses_experts_is_found() -> None:
    check_sizing(made_up_sizes(sees_experts=True))
    with pytest.raises(AssertionError, match="vLLM missed experts"):
        check_sizing(made_up_sizes(sees_experts=False))
    sizes = made_up_sizes(sees_experts=True)
    sizes["prefetch"] = [each | {"cache": each["cache"] + 300 * MIB} for each in sizes["prefetch"]]
    with pytest.raises(AssertionError, match="prefetch"):
        check_sizing(sizes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, ""),
        ({"budget": 5000}, "not counted"),
        ({"wanted": 4900}, "proves nothing"),
        ({"torch_peak_loading": 900}, "held twice"),
        ({"free_when_loaded": 4000}, "loading took"),
    ],
)
def test_a_shard_that_is_held_twice_is_found(wrong: dict[str, int], message: str) -> None:
    good = {"wanted": 5380, "free_at_start": 5000, "budget": 4612, "torch_peak_loading": 200}
    good |= {"free_when_loaded": 4700}
    memory = {key: value * MIB for key, value in (good | wrong).items()}
    if not message:
        check_memory(memory, 768 * MIB, 192 * MIB)
        return
    with pytest.raises(AssertionError, match=message):
        check_memory(memory, 768 * MIB, 192 * MIB)

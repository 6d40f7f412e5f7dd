"""The benchmarks in their smallest size: real ranks, driven by vLLM's own benchmark."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Checkpoints
from tests.helpers.engines import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_bench_measures_ranks_alone_and_beside_long_prompts(tmp_path: Path) -> None:
    output, picture = tmp_path / "result.json", tmp_path / "result.png"
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "bench", "--smoke"),
            *("--output", str(output), "--png", str(picture)),
        ],
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
        env=os.environ | {"COLUMNS": "160"},
    )
    assert ended.returncode == 0, ended.stderr
    assert "dwdp answers after" in ended.stderr
    assert "not touched by another's long prompts" in ended.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(output.read_text())
    assert [load["name"] for load in result["loads"]] == [
        "even, below saturation",
        "even, saturated",
        "skewed, saturated",
        "last rank alone",
    ]
    assert len(result["runs"]) == 4
    for run in result["runs"]:
        assert run["figures"]["tokens_per_s"] > 0
        assert 0 < run["figures"]["itl_p50_ms"] <= run["figures"]["itl_p99_ms"]
        assert run["figures"]["ttft_p50_ms"] > 0
    (dwdp,) = result["deployments"].values()
    assert dwdp["memory_bytes"] > 2**28
    assert all("--data-parallel-rank" in command for command in dwdp["commands"])
    assert len(result["independence"]["dwdp"]) == 1
    assert result["command"].startswith("vllm-dwdp bench --smoke")


def test_benchmark_serving_measures_two_deployments_in_turn(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Ranks and stock servers, each behind the real router; vLLM's flags go to `vllm bench serve`."""
    ended = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "benchmark_serving.py")),
            *("--model", checkpoints("qwen3_moe", 7), "--deployments", "dwdp,stock"),
            *("--rounds", "2", "--warmup-rounds", "0", "--serve-args=--enforce-eager"),
            *("--dataset-name", "random", "--random-input-len", "16"),
            *("--random-output-len", "8", "--num-prompts", "6", "--max-concurrency", "1"),
            *("--goodput", "ttft:60000", "tpot:60000", "--temperature", "0"),
            *("--result-dir", str(tmp_path), "--result-filename", "found.json"),
            "--save-detailed",
        ],
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "found.json").read_text())
    order = [(run["round"], run["deployment"]) for run in result["runs"]]
    assert order == [(1, "dwdp"), (1, "stock"), (2, "stock"), (2, "dwdp")]
    for run in result["runs"]:
        figures = run["figures"]
        assert figures["completed"] == 6
        assert figures["total_output_tokens"] == 48
        assert figures["request_goodput"] == pytest.approx(figures["request_throughput"])
        for name in ("ttft", "tpot", "itl"):
            assert 0 < figures[f"p50_{name}_ms"] <= figures[f"p99_{name}_ms"]
        cores = len(os.sched_getaffinity(0))
        assert figures["output_throughput_per_device"] == figures["output_throughput"] / cores
    ratios = {each["figure"]: each for each in result["comparisons"]}
    assert ratios["output_throughput"]["low"] <= ratios["output_throughput"]["high"]
    assert list(result["deployments"]) == ["dwdp", "stock"]
    for name, facts in result["deployments"].items():
        *ranks, router = map(shlex.split, facts["commands"])
        assert Path(router[0]).name == "vllm-router"
        assert [("dwdp" in command) for command in ranks] == [name == "dwdp"] * 2
        assert all(command[-4:-2] == ["--host", "127.0.0.1"] for command in ranks)
        assert facts["memory_bytes"] > 2**28
    assert "TTFT P99, ms" in ended.stdout and "goodput, requests/s" in ended.stdout
    assert "dwdp / stock" in ended.stdout
    texts = {
        name: [
            json.loads((tmp_path / f"found.{name}.{number}.json").read_text())["generated_texts"]
            for number in (1, 2)
        ]
        for name in ("dwdp", "stock")
    }
    assert texts["dwdp"][0] != texts["dwdp"][1], "each round has requests of its own"
    assert all(any(texts["dwdp"][number]) for number in (0, 1))
    assert texts["dwdp"] == texts["stock"]

"""The report of a benchmark: its ratios, tables and pictures."""

import json
from pathlib import Path

import pytest

from vllm_dwdp.entrypoints.bench.report import bench_pictures, show_result
from vllm_dwdp.entrypoints.bench.result import BenchResult, Run
from vllm_dwdp.entrypoints.bench.traffic import (
    ALONE,
    SKEWED,
    Load,
    Stream,
)
from vllm_dwdp.entrypoints.pictures.draw import write_png


def made_result() -> BenchResult:
    stream = Stream(input_tokens=8, output_tokens=8, concurrency=1, num_prompts=1)
    loads = (Load(name=SKEWED, streams=(stream, stream)), Load(name=ALONE, streams=(None, stream)))
    p99 = {("dwdp", SKEWED): 21.0, ("dwdp", ALONE): 20.0, ("tp", SKEWED): 90.0, ("tp", ALONE): 30.0}
    names = ["tokens_per_s"]
    names += [f"{name}_p{percent}_ms" for name in ("ttft", "tpot", "itl") for percent in (50, 99)]
    runs = tuple(
        Run(
            deployment=deployment,
            load=load,
            round=number,
            figures=dict.fromkeys(names, value * number),
            last_rank_itl_p99_ms=value * number,
            coverage=1.4,
            other_cores=0.5,
        )
        for (deployment, load), value in p99.items()
        for number in (1, 2, 3)
    )
    facts = {"commands": ["vllm serve m"], "start_s": 9.0, "memory_bytes": 2**30}
    return BenchResult(
        machine="a machine",
        command="vllm-dwdp bench",
        versions={"vllm": "0.32.0"},
        deployments={"dwdp": facts, "tp": facts},
        loads=loads,
        runs=runs,
    )


def test_ratios_compare_runs_of_one_round() -> None:
    result = made_result()
    assert result.independence() == {"dwdp": [1.05] * 3, "tp": [3.0] * 3}
    (ratio,) = [r for r in result.ratios() if r.load == SKEWED and r.figure == "itl_p99_ms"]
    assert (ratio.dwdp, ratio.other) == (42.0, 180.0)
    assert ratio.low == ratio.median == ratio.high == pytest.approx(21 / 90)
    content = json.loads(json.dumps(result.as_dict()))
    assert content["machine"] == "a machine"
    assert content["independence"]["tp"] == [3.0] * 3
    assert len(content["runs"]) == 12


def test_a_figure_that_a_load_does_not_have_has_no_ratio() -> None:
    result = made_result()
    for run_ in result.runs:
        run_.figures["tpot_p50_ms"] = 0.0
    assert {ratio.figure for ratio in result.ratios()} == set(result.runs[0].figures) - {
        "tpot_p50_ms"
    }


def test_the_report_says_whether_ranks_are_independent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    show_result(made_result())
    shown = capsys.readouterr().out
    assert "holds (1.05, wanted at most 1.1)" in shown
    assert "3.00 [3.00 - 3.00]" in shown
    assert "0.50 cores busy in the median run, 0.50 at most. Measure again" in shown


def test_its_pictures(tmp_path: Path) -> None:
    pictures = bench_pictures(made_result())
    write_png(pictures, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "1.05 times" in pictures[0].title
    assert pictures[1].title == "dwdp over the other deployments", "no even load was run"

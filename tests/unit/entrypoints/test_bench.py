"""`vllm-dwdp bench` without an engine: its traffic, its figures, its report, what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.unit.planner.models import MIXTRAL_8X7B
from vllm_dwdp.entrypoints.bench.calibrate import ENTRY, entry, products_per_s
from vllm_dwdp.entrypoints.bench.client import BenchClient
from vllm_dwdp.entrypoints.bench.machine import OtherWork
from vllm_dwdp.entrypoints.bench.report import bench_pictures, show_result
from vllm_dwdp.entrypoints.bench.result import BenchResult, Run
from vllm_dwdp.entrypoints.bench.traffic import (
    ALONE,
    SKEWED,
    Load,
    Shape,
    Stream,
    figures,
    make_loads,
    read_stream,
)
from vllm_dwdp.entrypoints.pictures.draw import write_png
from vllm_dwdp.errors import DwdpConfigError, DwdpError
from vllm_dwdp.planner.hardware import find_hardware
from vllm_dwdp.planner.model_shape import shape_of
from vllm_dwdp.planner.simulate import percentile


def test_loads_are_sized_to_the_seconds_asked_for() -> None:
    shape = Shape(seconds=10.0, concurrency=4)
    below, even, skewed, alone = make_loads(shape, 2, per_s=3.0, long_per_s=0.5)
    assert even.streams[0] is not None
    assert even.streams[0].num_prompts == 30
    assert below.streams[0] is not None
    assert below.streams[0].request_rate == 1.5
    assert below.streams[0].num_prompts == 15
    long, ordinary = skewed.streams
    assert long is not None
    assert long.input_tokens == shape.long_input_tokens
    assert long.num_prompts / 0.5 > 1.5 * shape.seconds, "the long prompts outlast the others"
    assert alone.streams == (None, ordinary), "the same requests, and nobody beside them"


def test_work_of_others_is_noticed() -> None:
    ours, theirs = (
        subprocess.Popen([sys.executable, "-c", "while True: pass"], env={"PATH": ""})
        for _ in range(2)
    )
    try:
        counted, not_counted = psutil.Process(ours.pid), psutil.Process(theirs.pid)
        without, everything = OtherWork([counted]), OtherWork([counted, not_counted])
        before, started = not_counted.cpu_times().user, time.monotonic()
        time.sleep(1.5)
        difference = without.cores() - everything.cores()
        cores = (not_counted.cpu_times().user - before) / (time.monotonic() - started)
        # However little of a busy machine it got: that much is seen in one and not in the other.
        assert cores > 0
        assert difference == pytest.approx(cores, abs=0.15)
    finally:
        for process in (ours, theirs):
            process.kill()
            process.wait()


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile(values, 100)) == (
        50,
        99,
        100,
    )
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 99) == 0.0


def test_figures_are_over_all_requests_of_all_ranks() -> None:
    common: dict[str, Any] = {
        "completed": 2,
        "duration": 2.0,
        "total_input_tokens": 6,
        "total_output_tokens": 4,
    }
    results = [
        read_stream(common | {"ttfts": [0.1, 0.3], "itls": [[0.01, 0.03], [0.02]]}),
        read_stream(common | {"ttfts": [0.2, 0.4], "itls": [[], []]}),
    ]
    found = figures(results)
    assert found["tokens_per_s"] == 10.0
    assert found["ttft_p50_ms"] == pytest.approx(200)
    assert found["itl_p99_ms"] == pytest.approx(30)
    assert found["tpot_p50_ms"] == pytest.approx(20)
    split = figures(results[:1], long_prompts=results[1:])
    assert split["tokens_per_s"] == 10.0
    assert split["ttft_p50_ms"] == pytest.approx(100)
    assert split["long_ttft_p50_ms"] == pytest.approx(200)


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


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", "0"), "--rounds is 0; it must be a whole number of at least 1."),
        (("--model", "/nowhere/model"), "--model /nowhere/model: [Errno 2] No such file"),
        (("--ranks", "1"), "--ranks is 1; it must be a whole number of at least 2."),
        (("--ranks", "4096"), "--ranks 4096 needs as many cores"),
        (("--seconds", "-1"), "--seconds is -1.0; it must be a number above 0."),
        (("--seconds", "nan"), "--seconds is nan; it must be a number"),
        (
            ("--baseline", "magic"),
            "--baseline 'magic' is unknown; known are replica, tp, stock, prefetch, dp-ep, disagg.",
        ),
        (("--baseline", "dp-ep"), "--baseline dp-ep needs GPUs"),
        (("--output", "/proc/nowhere.json"), "--output /proc/nowhere.json cannot be written"),
        (("--png", "/nowhere/b.png"), "--png /nowhere/b.png cannot be written"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(arguments: tuple[str, ...], message: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"vllm-dwdp: {message}"), ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


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


def answering(tmp_path: Path, program: str) -> BenchClient:
    """Return a client whose process is ours: no vLLM is imported."""
    client = BenchClient.__new__(BenchClient)
    client.log = tmp_path / "log"
    client.log.write_text("".join(f"line {number}\n" for number in range(99)))
    client._process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return client


@pytest.fixture
def sleeping_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchClient:
    """Return a client whose process sleeps; started while SIGINT is ignored."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return BenchClient([0], tmp_path / "log")
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_client_hears_signals_that_its_parent_ignores(sleeping_client: BenchClient) -> None:
    with sleeping_client as client:
        os.kill(client.pid, signal.SIGINT)
        assert client._process.wait(timeout=20) == -signal.SIGINT


def test_an_interrupted_benchmark_ends_its_client_at_once(sleeping_client: BenchClient) -> None:
    with pytest.raises(KeyboardInterrupt), sleeping_client:
        raise KeyboardInterrupt
    assert sleeping_client._process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("completed", "answer", "message"),
    [(3, "done", "3 of 4 requests were answered"), (4, "failed X", "failed X"), (4, "done", "")],
)
def test_a_run_with_failed_requests_is_refused(
    tmp_path: Path, completed: int, answer: str, message: str
) -> None:
    """They take no time, so figures of the others would flatter."""
    result = tmp_path / "result.json"
    errors = ["refused"] * (4 - completed) + [""] * completed
    result.write_text(json.dumps({"completed": completed, "errors": errors}))
    with answering(tmp_path, f"print({answer!r})") as client:
        if not message:
            assert client.finish(result)["completed"] == 4
            return
        with pytest.raises(DwdpError, match=message) as caught:
            client.finish(result)
    assert "line 98" in str(caught.value)
    assert "line 50" not in str(caught.value)


@pytest.mark.multiprocess
def test_a_client_whose_run_fails_says_so(tmp_path: Path) -> None:
    """It is vLLM's own benchmark that fails here: nobody listens on that port."""
    cores = sorted(os.sched_getaffinity(0))[:1]
    with BenchClient(cores, tmp_path / "log") as client:
        client.wait_until_ready()
        client.begin(["--no-such-option"])
        with pytest.raises(DwdpError, match="vllm bench serve failed") as caught:
            client.finish(tmp_path / "result.json")
        assert "--no-such-option" in str(caught.value), (
            "the end of its log, which goes with the run"
        )


@pytest.mark.parametrize("seconds", [-0.1, 0.0, 1e-9])
def test_a_disturbed_calibration_writes_no_entry_that_plan_would_refuse(seconds: float) -> None:
    shape = shape_of(MIXTRAL_8X7B)
    assert products_per_s(shape, 1e3, attention_tflops=1.0) > 0
    with pytest.raises(DwdpConfigError, match="measure again when the machine is idle"):
        products_per_s(shape, seconds, attention_tflops=1.0)

"""The report of `benchmarks/benchmark_serving.py`: its figures, ratios and table."""

import pytest

from vllm_dwdp.entrypoints.bench.serving_report import show_serving
from vllm_dwdp.entrypoints.bench.serving_result import ServingResult, ServingRun, figures_of


def made_result() -> ServingResult:
    facts = {"num_devices": 4, "start_s": 9.0, "memory_bytes": 2**30}
    runs = tuple(
        ServingRun(
            deployment=name,
            round=number,
            figures=figures_of(
                {"output_throughput": speed * number, "request_goodput": 3, "p99_itl_ms": 2.5,
                 "ttfts": [1.0], "label": name, "request_rate": "inf", "rtfx": 0.0},
                num_devices=4,
            ),
            other_cores=0.3,
        )
        for name, speed in (("dwdp", 30.0), ("tp", 20.0))
        for number in (1, 2, 3)
    )  # fmt: skip
    return ServingResult(
        machine="a machine", command="again", versions={}, model="/m",
        deployments={"dwdp": facts, "tp": facts}, runs=runs,
    )  # fmt: skip


def test_figures_are_vllms_and_tokens_of_a_device() -> None:
    figures = made_result().runs[0].figures
    assert figures["output_throughput_per_device"] == 7.5
    assert {"ttfts", "label", "request_rate"}.isdisjoint(figures)
    without = figures_of({"p99_e2el_ms": 1}, num_devices=2)
    assert without == {"p99_e2el_ms": 1.0}, "what pools generates no tokens"


def test_ratios_are_of_the_first_deployment_round_by_round() -> None:
    result = made_result()
    found = {each.figure: each for each in result.comparisons()}
    ratio = found["output_throughput"]
    assert (ratio.deployment, ratio.other) == ("dwdp", "tp")
    assert ratio.low == ratio.median == ratio.high == pytest.approx(1.5)
    half = ServingResult(**(vars(result) | {"runs": result.runs[:4]}))
    assert half.comparisons()[0].median == pytest.approx(1.5), "of the round that both have"


def test_the_table_has_every_figure_and_says_who_disturbed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vllm_dwdp.entrypoints.tables.console.width", 200)
    show_serving(made_result())
    shown = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if "│" in line}
    assert "60" in rows["output tokens/s"] and "1.50 [1.50 - 1.50]" in rows["output tokens/s"]
    assert "15" in rows["output tokens/s and device"]
    assert "goodput, requests/s" in rows and "ITL P99, ms" in rows
    assert "TTFT P99, ms" not in rows, "no run has it"
    assert "0.30 cores busy in the median run, 0.30 at most. Measure again" in shown

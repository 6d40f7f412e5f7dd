"""What `vllm-dwdp bench` shows of its result: tables and pictures."""

import statistics
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from vllm_dwdp.entrypoints.bench.deployments import DWDP
from vllm_dwdp.entrypoints.bench.result import BenchResult, Ratio
from vllm_dwdp.entrypoints.bench.traffic import ALONE, EVEN_SATURATED, SKEWED
from vllm_dwdp.entrypoints.pictures.figures import Bar, Bars, Picture
from vllm_dwdp.entrypoints.tables import say, show

RESULTS = Path("benchmarks/results")
INDEPENDENT = 1.1
"""Largest P99 ratio at which we say that a rank is not touched by another's long prompts."""
BUSY_CORES = 0.1
WIDE = 4.0
"""Largest over smallest ratio from which a picture is drawn in powers of two."""
_SHOWN = {
    "tokens_per_s": "tokens/s",
    "ttft_p50_ms": "TTFT P50, ms",
    "ttft_p99_ms": "TTFT P99, ms",
    "tpot_p50_ms": "TPOT P50, ms",
    "tpot_p99_ms": "TPOT P99, ms",
    "itl_p50_ms": "ITL P50, ms",
    "itl_p99_ms": "ITL P99, ms",
    "long_ttft_p50_ms": "TTFT P50 of long prompts, ms",
}
_PICTURED = ("tokens_per_s", "ttft_p50_ms", "itl_p99_ms")


def default_output() -> Path:
    """Name a new file in the results folder."""
    return RESULTS / f"bench-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"


def show_result(result: BenchResult) -> None:
    """Print deployments, ratios to each baseline, and whether ranks are independent."""
    say(result.machine)
    memory = "memory, MiB (shared pages once)"
    show("deployments", ("", "answers after, s", memory), _deployment_rows(result))
    for baseline in result.deployments:
        if baseline != DWDP:
            show(
                f"dwdp over {baseline}: median of the rounds, lowest - highest; below 1 is less time, "
                "or fewer tokens/s",
                ("load", "figure", "dwdp", baseline, f"dwdp / {baseline}"),
                _ratio_rows([r for r in result.ratios() if r.baseline == baseline]),
            )
    show(
        f"P99 ITL of the last rank: {SKEWED} over {ALONE}",
        ("", "alone, ms", "beside long prompts, ms", "ratio"),
        _independence_rows(result),
    )
    say(*_verdicts(result))


def _deployment_rows(result: BenchResult) -> Iterator[tuple[str, ...]]:
    for name, facts in result.deployments.items():
        yield name, f"{facts['start_s']:.0f}", f"{facts['memory_bytes'] / 2**20:.0f}"


def _ratio_rows(ratios: Sequence[Ratio]) -> Iterator[tuple[str, ...]]:
    previous = ""
    for ratio in ratios:
        yield (
            ratio.load if ratio.load != previous else "",
            _SHOWN[ratio.figure],
            f"{ratio.dwdp:.1f}",
            f"{ratio.other:.1f}",
            f"{ratio.median:.2f} [{ratio.low:.2f} - {ratio.high:.2f}]",
        )
        previous = ratio.load


def _independence_rows(result: BenchResult) -> Iterator[tuple[str, ...]]:
    for name, ratios in result.independence().items():
        alone, beside = (
            statistics.median(
                run.last_rank_itl_p99_ms
                for run in result.runs
                if run.deployment == name and run.load == load
            )
            for load in (ALONE, SKEWED)
        )
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f} - {max(ratios):.2f}]"
        yield name, f"{alone:.1f}", f"{beside:.1f}", spread


def _verdicts(result: BenchResult) -> Iterator[str]:
    ours = statistics.median(result.independence()[DWDP])
    verdict = "holds" if ours <= INDEPENDENT else "does NOT hold"
    yield (
        f"A rank is not touched by another's long prompts: {verdict} ({ours:.2f}, wanted at most "
        f"{INDEPENDENT})."
    )
    for name in result.deployments:
        covered = min(
            run.coverage for run in result.runs if (run.load, run.deployment) == (SKEWED, name)
        )
        if covered < 1:
            yield (
                f"On {name} the long prompts ended after {100 * covered:.0f} % of a run, so the ratio "
                "understates what they do."
            )
    yield how_busy([run.other_cores for run in result.runs])


def how_busy(other_cores: Sequence[float]) -> str:
    """Say what other processes did beside the runs, and when that was too much."""
    median, most = statistics.median(other_cores), max(other_cores)
    advice = " Measure again when the machine is idle." if median > BUSY_CORES else ""
    return f"Other processes kept {median:.2f} cores busy in the median run, {most:.2f} at most.{advice}"


def bench_pictures(result: BenchResult) -> list[Picture]:
    """Show independence, and ratios to the baselines."""
    independence = result.independence()
    ours = statistics.median(independence[DWDP])
    pictures: list[Picture] = [
        Bars(
            title="Another rank's long prompts make the P99 inter-token latency of a dwdp rank "
            f"{ours:.2f} times as long",
            x_label="P99 ITL of the last rank, beside long prompts over alone; line: lowest - highest",
            bars=[
                Bar(label=name, value=statistics.median(all_), low=min(all_), high=max(all_))
                for name, all_ in independence.items()
            ],
            reference=1.0,
            band=(1 / INDEPENDENT, INDEPENDENT),
            log_x=_is_wide([ratio for all_ in independence.values() for ratio in all_]),
        )
    ]
    ratios = [r for r in result.ratios() if r.figure in _PICTURED and r.load != ALONE]
    if ratios:
        pictures.append(
            Bars(
                title=_throughput_title(ratios),
                x_label="ratio: tokens/s (more is better), TTFT and ITL (less is better)",
                bars=[
                    Bar(
                        label=f"{r.load}: {_SHOWN[r.figure]} / {r.baseline}",
                        value=r.median,
                        low=r.low,
                        high=r.high,
                        group=f"over {r.baseline}",
                    )
                    for r in ratios
                ],
                reference=1.0,
                log_x=_is_wide([edge for r in ratios for edge in (r.low, r.high)]),
            )
        )
    return pictures


def _is_wide(ratios: Sequence[float]) -> bool:
    return max(ratios) > WIDE * min(ratios)


def _throughput_title(ratios: Sequence[Ratio]) -> str:
    said = [
        f"{r.median:.2f} times those of {r.baseline}"
        for r in ratios
        if (r.load, r.figure) == (EVEN_SATURATED, "tokens_per_s")
    ]
    if not said:
        return "dwdp over the other deployments"
    return f"Tokens/s of dwdp on even, saturated traffic: {' and '.join(said)}"

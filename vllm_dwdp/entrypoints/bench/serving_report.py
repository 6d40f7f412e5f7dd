"""What `benchmarks/benchmark_serving.py` prints: one table, and what was beside the measurement."""

from collections.abc import Iterator

from vllm_dwdp.entrypoints.bench.report import how_busy
from vllm_dwdp.entrypoints.bench.serving_result import SHOWN, ServingResult
from vllm_dwdp.entrypoints.tables import figure, say, show


def show_serving(result: ServingResult) -> None:
    """Print medians of every deployment, and ratios of the first to the others."""
    say(result.machine)
    first, *others = result.deployments
    headings = (
        "median of the rounds",
        *result.deployments,
        *(f"{first} / {other}" for other in others),
    )
    title = f"{result.model}; ratios: median of the rounds [lowest - highest]"
    show(title, headings, _rows(result))
    say(how_busy([run.other_cores for run in result.runs]))


def _rows(result: ServingResult) -> Iterator[tuple[str, ...]]:
    _, *others = result.deployments
    ratios = {(each.other, each.figure): each for each in result.comparisons()}
    for name in ("num_devices", "start_s", "memory_bytes"):
        facts = [facts[name] for facts in result.deployments.values()]
        yield (*_fact(name, facts), *("" for _ in others))
    for name in result.figures():
        found = [ratios.get((other, name)) for other in others]
        yield (
            SHOWN[name],
            *(figure(result.median(deployment, name)) for deployment in result.deployments),
            *(f"{r.median:.2f} [{r.low:.2f} - {r.high:.2f}]" if r else "" for r in found),
        )


def _fact(name: str, values: list[float]) -> tuple[str, ...]:
    if name == "memory_bytes":
        return "memory, MiB (shared pages once)", *(f"{value / 2**20:.0f}" for value in values)
    title = {"num_devices": "devices (on CPUs: cores)", "start_s": "answers after, s"}[name]
    return title, *(f"{value:.0f}" for value in values)

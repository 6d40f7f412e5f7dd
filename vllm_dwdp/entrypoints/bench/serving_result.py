"""What `benchmarks/benchmark_serving.py` found: vLLM's own figures by round, and their ratios. Pure."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vllm_dwdp.entrypoints.bench.result import by_round

PER_DEVICE = "output_throughput_per_device"
SHOWN = {
    "output_throughput": "output tokens/s",
    PER_DEVICE: "output tokens/s and device",
    "total_token_throughput": "tokens/s, prompts too",
    "request_throughput": "requests/s",
    "request_goodput": "goodput, requests/s",
    **{
        f"p{percent}_{key}_ms": f"{name} P{percent}, ms"
        for key, name in (
            ("ttft", "TTFT"),
            ("tpot", "TPOT"),
            ("itl", "ITL"),
            ("e2el", "end to end"),
        )
        for percent in (50, 99)
    },
}
"""Figures for the table, as `vllm bench serve` spells them; goodput is what keeps to `--goodput`."""


def figures_of(found: Mapping[str, Any], num_devices: int) -> dict[str, float]:
    """Take every number out of a result of `vllm bench serve`, and add the tokens of a device."""
    figures = {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if "output_throughput" in figures:
        figures[PER_DEVICE] = figures["output_throughput"] / num_devices
    return figures


@dataclass(frozen=True, kw_only=True)
class ServingRun:
    """One deployment in one round.

    Args:
        figures: as `vllm bench serve` names them.
        other_cores: that processes which are neither deployment nor client kept busy meanwhile.
    """

    deployment: str
    round: int
    figures: dict[str, float]
    other_cores: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The first deployment over another one: the median of the rounds, and their spread."""

    deployment: str
    other: str
    figure: str
    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ServingResult:
    """All runs, and what made them.

    Args:
        deployments: facts by name, in the order of the command; empty until it has run.
    """

    machine: str
    command: str
    versions: dict[str, str]
    model: str
    deployments: dict[str, dict[str, Any]]
    runs: tuple[ServingRun, ...] = field(repr=False)

    def with_deployment(self, name: str, facts: dict[str, Any]) -> "ServingResult":
        """Know this of a deployment."""
        return replace(self, deployments=self.deployments | {name: facts})

    def with_run(self, run: ServingRun) -> "ServingResult":
        """Have one more run."""
        return replace(self, runs=(*self.runs, run))

    def figures(self) -> list[str]:
        """List the figures of the table that every run has."""
        return [name for name in SHOWN if all(name in run.figures for run in self.runs)]

    def values(self, deployment: str, figure: str) -> dict[int, float]:
        """Return a figure by round."""
        return {run.round: run.figures[figure] for run in self.runs if run.deployment == deployment}

    def median(self, deployment: str, figure: str) -> float:
        """Return the median of the rounds."""
        return statistics.median(self.values(deployment, figure).values())

    def comparisons(self) -> list[Comparison]:
        """Compare the first deployment to every other, round by round, in rounds that both have."""
        first, *others = self.deployments
        return [
            Comparison(
                deployment=first,
                other=other,
                figure=figure,
                median=statistics.median(ratios),
                low=min(ratios),
                high=max(ratios),
            )
            for other in others
            for figure in self.figures()
            if (ratios := self._ratios(first, other, figure))
        ]

    def _ratios(self, first: str, other: str, figure: str) -> list[float]:
        ours, theirs = (self.values(name, figure) for name in (first, other))
        rounds = ours.keys() & theirs.keys()
        return by_round(*({number: all_[number] for number in rounds} for all_ in (ours, theirs)))

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON."""
        return asdict(self) | {"comparisons": [asdict(each) for each in self.comparisons()]}

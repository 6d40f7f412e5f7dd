"""What a benchmark found: runs, ratios to the baselines, independence of ranks. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_dwdp.entrypoints.bench.deployments import DWDP
from vllm_dwdp.entrypoints.bench.traffic import ALONE, SKEWED, Load


@dataclass(frozen=True, kw_only=True)
class Run:
    """One load on one deployment in one round.

    Args:
        figures: by name, as `traffic.figures` gives them.
        last_rank_itl_p99_ms: of the requests of the last rank only.
        coverage: seconds of the first rank's stream over those of the last rank's.
        other_cores: that processes which are neither deployment nor client kept busy meanwhile.
    """

    deployment: str
    load: str
    round: int
    figures: dict[str, float]
    last_rank_itl_p99_ms: float
    coverage: float
    other_cores: float


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """All runs, and what made them."""

    machine: str
    command: str
    versions: dict[str, str]
    deployments: dict[str, dict[str, Any]]
    loads: tuple[Load, ...]
    runs: tuple[Run, ...] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON."""
        return asdict(self) | {
            "ratios": [asdict(ratio) for ratio in self.ratios()],
            "independence": self.independence(),
        }

    def ratios(self) -> list["Ratio"]:
        """Compare every figure of DWDP to the same of each baseline, round by round.

        Not those that a load does not have, e.g. an inter-token latency where one token is generated.
        """
        found = [
            _ratio(self.runs, baseline, load.name, figure)
            for load in self.loads
            for baseline in self.deployments
            if baseline != DWDP
            for figure in self.runs[0].figures
        ]
        return [ratio for ratio in found if ratio is not None]

    def independence(self) -> dict[str, list[float]]:
        """Divide the last rank's P99 inter-token latency beside long prompts by that alone, by round."""
        found: dict[str, list[float]] = {}
        for name in self.deployments:
            beside, alone = (
                {run.round: run.last_rank_itl_p99_ms for run in self.runs
                 if run.deployment == name and run.load == load}
                for load in (SKEWED, ALONE)
            )  # fmt: skip
            found[name] = [beside[number] / alone[number] for number in sorted(beside)]
        return found


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """DWDP over a baseline: the median of the rounds, and their spread."""

    load: str
    baseline: str
    figure: str
    dwdp: float
    other: float
    median: float
    low: float
    high: float


def _ratio(runs: Sequence[Run], baseline: str, load: str, figure: str) -> Ratio | None:
    ours, theirs = (
        {run.round: run.figures[figure] for run in runs
         if run.deployment == name and run.load == load}
        for name in (DWDP, baseline)
    )  # fmt: skip
    ratios = by_round(ours, theirs)
    if not ratios:
        return None
    return Ratio(
        load=load,
        baseline=baseline,
        figure=figure,
        dwdp=statistics.median(ours.values()),
        other=statistics.median(theirs.values()),
        median=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
    )


def by_round(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Divide what two deployments showed in the same rounds; nothing where a figure is missing or 0."""
    if not all((*ours.values(), *theirs.values())):
        return []
    return [ours[number] / theirs[number] for number in sorted(ours)]

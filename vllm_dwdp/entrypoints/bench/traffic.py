"""The traffic of `vllm-dwdp bench`, and what one run of it showed. Pure.

Each rank has its own stream of requests, driven by its own `vllm bench serve`. A stream is closed-loop
(`concurrency` requests at a time) or open-loop (`request_rate` per second).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_dwdp.planner.simulate import percentile

PERCENTILES = (50, 99)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The requests of one rank.

    Args:
        input_tokens, output_tokens: of each request.
        concurrency: requests at a time, at most.
        num_prompts: requests in all.
        request_rate: per second, Poisson; None sends as fast as `concurrency` allows.
        spread: lengths are uniform in [1 - spread, 1 + spread] times the above.
    """

    input_tokens: int
    output_tokens: int
    concurrency: int
    num_prompts: int
    request_rate: float | None = None
    spread: float = 0.0

    @property
    def is_long(self) -> bool:
        """Whether it is prompts only."""
        return self.output_tokens == 1

    def arguments(self, url: str, tokenizer: str, result: Path, seed: int) -> list[str]:
        """List the arguments of `vllm bench serve`."""
        rate = "inf" if self.request_rate is None else f"{self.request_rate:.4g}"
        return [
            *("--base-url", url, "--model", "m", "--tokenizer", tokenizer),
            *("--dataset-name", "random", "--random-input-len", str(self.input_tokens)),
            *("--random-output-len", str(self.output_tokens), "--ignore-eos"),
            *("--random-range-ratio", str(self.spread)),
            *("--max-concurrency", str(self.concurrency), "--request-rate", rate),
            *("--num-prompts", str(self.num_prompts), "--seed", str(seed), "--disable-tqdm"),
            *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99"),
            *("--save-result", "--save-detailed", "--result-dir", str(result.parent)),
            *("--result-filename", result.name),
        ]


@dataclass(frozen=True, kw_only=True)
class Load:
    """One stream per rank; None leaves a rank idle."""

    name: str
    streams: tuple[Stream | None, ...]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the traffic, and how long a run shall take.

    Args:
        input_tokens, output_tokens, concurrency: of the ordinary requests.
        long_input_tokens: of the long prompts, answered by one token, two at a time.
        seconds: of a run, about.
    """

    input_tokens: int = 64
    output_tokens: int = 64
    concurrency: int = 4
    long_input_tokens: int = 1536
    seconds: float = 8.0


EVEN_SATURATED, EVEN_BELOW = "even, saturated", "even, below saturation"
SKEWED, ALONE = "skewed, saturated", "last rank alone"
EVEN_SPREAD = 0.3
"""Of the lengths of even traffic, so that ranks and requests do not run in step."""
BELOW_SHARE = 0.5
"""Request rate below saturation, of the rate at saturation."""
FEWEST_PROMPTS = 8
"""Of a run below saturation: of fewer, percentiles say nothing."""
LONG_STREAM_MARGIN = 1.6
"""The long prompts shall outlast the run of the others."""


def probe_load(shape: Shape, num_ranks: int) -> Load:
    """Describe a first run that warms up and shows how many requests fill `shape.seconds`."""
    count = 2 * shape.concurrency
    return Load(name="probe", streams=(_ordinary(shape, count),) * num_ranks)


def long_probe_load(shape: Shape, num_ranks: int) -> Load:
    """Describe the same run for the long prompts."""
    return Load(name="probe of long prompts", streams=(_long(shape, 4), *(None,) * (num_ranks - 1)))


def make_loads(shape: Shape, num_ranks: int, per_s: float, long_per_s: float) -> list[Load]:
    """Size the loads of a benchmark by the probes.

    Args:
        per_s: ordinary requests per second that one rank answered.
        long_per_s: long prompts per second.
    """
    saturated = _ordinary(shape, max(2 * shape.concurrency, round(per_s * shape.seconds)))
    even = replace(saturated, spread=EVEN_SPREAD)
    below = replace(
        even,
        request_rate=BELOW_SHARE * per_s,
        num_prompts=max(FEWEST_PROMPTS, round(BELOW_SHARE * per_s * shape.seconds)),
    )
    long = _long(shape, max(4, round(LONG_STREAM_MARGIN * long_per_s * shape.seconds)))
    rest = (saturated,) * (num_ranks - 1)
    return [
        Load(name=EVEN_BELOW, streams=(below,) * num_ranks),
        Load(name=EVEN_SATURATED, streams=(even,) * num_ranks),
        Load(name=SKEWED, streams=(long, *rest)),
        Load(name=ALONE, streams=(None, *(None,) * (num_ranks - 2), saturated)),
    ]


def _ordinary(shape: Shape, num_prompts: int) -> Stream:
    return Stream(
        input_tokens=shape.input_tokens,
        output_tokens=shape.output_tokens,
        concurrency=shape.concurrency,
        num_prompts=num_prompts,
    )


def _long(shape: Shape, num_prompts: int) -> Stream:
    return Stream(
        input_tokens=shape.long_input_tokens,
        output_tokens=1,
        concurrency=2,
        num_prompts=num_prompts,
    )


@dataclass(frozen=True, kw_only=True)
class StreamResult:
    """What one stream saw: seconds, and its tokens per second."""

    duration_s: float
    num_requests: int
    tokens_per_s: float
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    itl_s: tuple[float, ...]


def read_stream(found: Mapping[str, Any]) -> StreamResult:
    """Read the detailed result of one `vllm bench serve`."""
    gaps = [tuple(request) for request in found["itls"]]
    return StreamResult(
        duration_s=found["duration"],
        num_requests=found["completed"],
        tokens_per_s=(found["total_input_tokens"] + found["total_output_tokens"])
        / found["duration"],
        ttft_s=tuple(found["ttfts"]),
        tpot_s=tuple(statistics.mean(request) for request in gaps if request),
        itl_s=tuple(gap for request in gaps for gap in request),
    )


def figures(
    results: Sequence[StreamResult], long_prompts: Sequence[StreamResult] = ()
) -> dict[str, float]:
    """Return tokens/s of all streams, and percentiles over the requests of each kind, ms.

    Args:
        results: of the ordinary streams.
        long_prompts: of the streams of long prompts; they only have a time to first token.
    """
    everything = [*results, *long_prompts]
    summary = {"tokens_per_s": sum(result.tokens_per_s for result in everything)}
    for name in ("ttft", "tpot", "itl"):
        values = [value for result in results for value in getattr(result, f"{name}_s")]
        for percent in PERCENTILES:
            summary[f"{name}_p{percent}_ms"] = 1e3 * percentile(values, percent)
    waited = [value for result in long_prompts for value in result.ttft_s]
    summary["long_ttft_p50_ms"] = 1e3 * percentile(waited, 50)
    return summary

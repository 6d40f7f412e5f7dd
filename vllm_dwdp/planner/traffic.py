"""What is served: sizes for `plan`, requests for `simulate`, drawn at random or read from a trace."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import real, whole
from vllm_dwdp.planner.step import Step


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The sizes of requests and of steps.

    Args:
        input_tokens, output_tokens: per request.
        variation: standard deviation of a rank's tokens per step over their mean.
        max_num_batched_tokens: vLLM's limit per step and rank.
        batch_size: sequences that decode together on a rank.
    """

    input_tokens: int
    output_tokens: int
    variation: float
    max_num_batched_tokens: int
    batch_size: int

    def __post_init__(self) -> None:
        whole("--input-tokens", self.input_tokens, 1)
        whole("--output-tokens", self.output_tokens, 0)
        whole("--max-num-batched-tokens", self.max_num_batched_tokens, 1)
        whole("--batch-size", self.batch_size, 1)
        real("--variation", self.variation, 0, 1)

    @property
    def prefill_step(self) -> Step:
        """A full step of prompts."""
        return Step.prefill(self.max_num_batched_tokens, self.input_tokens)

    @property
    def decode_step(self) -> Step:
        """A step of all sequences at half of their answers."""
        return Step.decode(self.batch_size, self.input_tokens + self.output_tokens / 2)


@dataclass(frozen=True, kw_only=True, order=True)
class Request:
    """One prompt, at a rank from `arrival_s` on."""

    arrival_s: float
    input_tokens: int


def poisson_traffic(
    *,
    num_requests: int,
    requests_per_s: float,
    input_tokens: int,
    smallest_share: float,
    seed: int,
) -> list[Request]:
    """Draw Poisson arrivals, prompt lengths uniform in [smallest_share * input_tokens, input_tokens].

    Raises:
        DwdpConfigError: a rate, length or share that cannot be.
    """
    real("--rate", requests_per_s, above=True)
    whole("--input-tokens", input_tokens, 1)
    whole("--requests", num_requests, 1)
    real("--smallest-share", smallest_share, 0, 1, above=True)
    dice, now, requests = random.Random(seed), 0.0, []
    for _ in range(num_requests):
        now += dice.expovariate(requests_per_s)
        length = round(dice.uniform(smallest_share, 1.0) * input_tokens)
        requests.append(Request(arrival_s=now, input_tokens=max(1, length)))
    return requests


def read_trace(path: Path) -> list[Request]:
    """Read a trace: a line `{"arrival_s": 0.25, "input_tokens": 812}` per request; no other key is read.

    Returns:
        By arrival, counted from the first one.

    Raises:
        DwdpConfigError: the file cannot be read, or a line is broken; names its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DwdpConfigError(f"--trace {path}: {error}.") from error
    requests = sorted(
        _trace_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()
    )
    if not requests:
        raise DwdpConfigError(f"--trace {path} holds no request.")
    first = requests[0].arrival_s
    return [replace(request, arrival_s=request.arrival_s - first) for request in requests]


def _trace_line(path: Path, number: int, line: str) -> Request:
    where = f"--trace {path}, line {number}"
    try:
        entry = json.loads(line)
        arrival, tokens = entry["arrival_s"], entry["input_tokens"]
    except (ValueError, KeyError, TypeError) as error:
        raise DwdpConfigError(
            f'{where}: {line[:60]!r} is not {{"arrival_s": seconds, "input_tokens": count}}.'
        ) from error
    return Request(
        arrival_s=real(f"{where}: arrival_s", arrival),
        input_tokens=whole(f"{where}: input_tokens", tokens, 1),
    )

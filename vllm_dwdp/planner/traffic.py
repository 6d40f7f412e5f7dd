"""Requests of a simulation: drawn from a distribution, or read from a trace."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from vllm_dwdp.errors import DwdpConfigError


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
    """Poisson arrivals, prompt lengths uniform in [smallest_share * input_tokens, input_tokens].

    Raises:
        DwdpConfigError: a rate, length or share that cannot be.
    """
    if not requests_per_s > 0:
        raise DwdpConfigError(f"--rate {requests_per_s} must be positive.")
    if input_tokens < 1 or num_requests < 1:
        raise DwdpConfigError("--input-tokens and --requests must be at least 1.")
    if not 0 < smallest_share <= 1:
        raise DwdpConfigError(f"--smallest-share {smallest_share} must lie in (0, 1].")
    dice, now, requests = random.Random(seed), 0.0, []
    for _ in range(num_requests):
        now += dice.expovariate(requests_per_s)
        length = round(dice.uniform(smallest_share, 1.0) * input_tokens)
        requests.append(Request(arrival_s=now, input_tokens=max(1, length)))
    return requests


def read_trace(path: Path) -> list[Request]:
    """A JSON-lines trace: `{"arrival_s": 0.25, "input_tokens": 812}` per line.

    Raises:
        DwdpConfigError: the file cannot be read, or a line is broken; names its number.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DwdpConfigError(f"--trace {path}: {error}.") from error
    requests = [_trace_line(path, number, line) for number, line in enumerate(lines, 1) if line]
    if not requests:
        raise DwdpConfigError(f"--trace {path} holds no request.")
    return sorted(requests)


def _trace_line(path: Path, number: int, line: str) -> Request:
    try:
        entry = json.loads(line)
        arrival, tokens = float(entry["arrival_s"]), int(entry["input_tokens"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DwdpConfigError(
            f"--trace {path}, line {number}: {line[:60]!r} is not "
            '{"arrival_s": seconds, "input_tokens": count}.'
        ) from error
    if not 0 <= arrival < float("inf") or tokens < 1:
        raise DwdpConfigError(
            f"--trace {path}, line {number}: {line[:60]!r} needs a finite time from 0 on and a token."
        )
    return Request(arrival_s=arrival, input_tokens=tokens)

"""Requests of a simulation: drawn from a distribution, or read from a trace."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import MOST_OF_ANYTHING, MOST_TOKENS, parse_json, real, whole

MOST_REQUESTS = 5_000_000


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
    real("--rate", requests_per_s, 1e-6, MOST_OF_ANYTHING)
    whole("--input-tokens", input_tokens, 1, MOST_TOKENS)
    whole("--requests", num_requests, 1, MOST_REQUESTS)
    real("--smallest-share", smallest_share, 0, 1, above=True)
    dice, now, requests = random.Random(seed), 0.0, []
    for _ in range(num_requests):
        now += dice.expovariate(requests_per_s)
        length = round(dice.uniform(smallest_share, 1.0) * input_tokens)
        requests.append(Request(arrival_s=now, input_tokens=max(1, length)))
    return requests


def read_trace(path: Path) -> list[Request]:
    """A JSON-lines trace: `{"arrival_s": 0.25, "input_tokens": 812}` per line; other keys are not read.

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
        entry = parse_json(line)
        arrival, tokens = entry["arrival_s"], entry["input_tokens"]
    except (ValueError, KeyError, TypeError) as error:
        raise DwdpConfigError(
            f'{where}: {line[:60]!r} is not {{"arrival_s": seconds, "input_tokens": count}}.'
        ) from error
    return Request(
        arrival_s=real(f"{where}: arrival_s", arrival, 0, 10 * MOST_OF_ANYTHING),
        input_tokens=whole(f"{where}: input_tokens", tokens, 1, MOST_TOKENS),
    )

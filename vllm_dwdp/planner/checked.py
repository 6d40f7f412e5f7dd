"""Numbers and files from outside, checked once: options, config.json, TOML, traces. Pure.

Every refusal is a `DwdpConfigError` of one line. The bounds are wider than any machine or model there
is, and narrow enough that no sum over them overflows or takes for ever.
"""

import json
from typing import Any

from vllm_dwdp.errors import DwdpConfigError

MOST_TOKENS = 10_000_000
"""Of a prompt, an answer or a step."""
MOST_SEQUENCES = 1_000_000
MOST_RANKS = 4096
MOST_LAYERS = 10_000
MOST_OF_ANYTHING = 10**9
"""Of the sizes in a config.json, seconds, rates."""
_SHOWN = 40


def whole(what: str, value: object, low: int, high: int) -> int:
    """The value, if it is a whole number from `low` to `high`.

    Args:
        what: the option or field, for the message.

    Raises:
        DwdpConfigError: it is none; 3.0, "3" and true are none either.
    """
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise DwdpConfigError(
        f"{what} is {shown(value)}; it must be a whole number from {low:,} to {high:,}."
    )


def real(what: str, value: object, low: float, high: float, *, above: bool = False) -> float:
    """The value as a float, if it is a number from `low` to `high`; not `low` itself if `above`.

    Raises:
        DwdpConfigError: it is none; "3", true, nan and infinity are none.
    """
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and low <= value <= high
        and not (above and value == low)
    ):
        return float(value)
    span = f"above {low:,g} and at most {high:,g}" if above else f"from {low:,g} to {high:,g}"
    raise DwdpConfigError(f"{what} is {shown(value)}; it must be a number {span}.")


def shown(value: object) -> str:
    """A value in a message: short, on one line."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to print some of these
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def parse_json(text: str) -> Any:
    """The content.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error

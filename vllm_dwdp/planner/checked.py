"""Checks of numbers from outside: options, config.json, TOML, traces. Pure.

Every refusal is a `DwdpConfigError` of one line.
"""

import math

from vllm_dwdp.errors import DwdpConfigError

_SHOWN = 40


def whole(what: str, value: object, low: int, high: int | None = None) -> int:
    """Return the value if it is a whole number from `low` to `high`.

    Args:
        what: the option or field, for the message.

    Raises:
        DwdpConfigError: it is none; 3.0, "3" and true are none either.
    """
    most = math.inf if high is None else high
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= most:
        return value
    span = f"of at least {low:,}" if high is None else f"from {low:,} to {high:,}"
    raise DwdpConfigError(f"{what} is {shown(value)}; it must be a whole number {span}.")


def real(
    what: str, value: object, low: float = 0.0, high: float = math.inf, *, above: bool = False
) -> float:
    """Return the value as a float if it is a number from `low` to `high`; not `low` itself if `above`.

    Raises:
        DwdpConfigError: it is none; "3", true, nan and infinity are none.
    """
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
        and not (above and value == low)
    ):
        return float(value)
    span = f"above {low:g}" if above else f"of at least {low:g}"
    most = f" and at most {high:g}" if high < math.inf else ""
    raise DwdpConfigError(f"{what} is {shown(value)}; it must be a number {span}{most}.")


def shown(value: object) -> str:
    """Shorten a value to one line for a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."

"""The promises of the GPU benchmark, on made-up rows."""

from typing import Any

import pytest

from gpu_checks.bench_table import broken_promises, print_tables


def row(
    ratio: float, *, host: bool = True, fill_ms: float = 1.0, same: bool = True
) -> dict[str, Any]:
    ways = ["resident eager", "resident piecewise", "prefetch eager", "prefetch piecewise"]
    ms = {name: {"median": 8.0} for name in [*ways, "prefetch full"]}
    copies = {
        "fill_ms": fill_ms,
        "fill_gbps": 1,
        "plain_gbps": 1,
        "ratio": 1,
        "read_gbps": 1,
        "how": "somehow",
    }
    host_us = {"issue": 1.0, "slices": 2, "wait_and_record": 1, "added_to_a_replay": 1}
    return {
        "case": "a-host" if host else "a",
        "tokens": 4,
        "kernel": "k",
        "device": "a GPU",
        "moe_ms": 1.0,
        "ms": ms,
        "copies": copies,
        "host_us": host_us,
        "ratios": {f"prefetch {mode}": ratio for mode in ("eager", "piecewise", "full")},
        "same": {"eager": same},
    }


@pytest.mark.parametrize(
    ("made", "num_broken"),
    [
        (row(1.02), 0),
        (row(1.05), 3),
        (row(1.05, host=False), 0),  # no copy engine of its own
        (row(1.05, fill_ms=9.0), 0),  # a layer does not compute for as long as it is copied
        (row(1.02, same=False), 1),
        (row(1.05) | {"device": "NOT A GPU: ..."}, 0),
    ],
)
def test_a_broken_promise_is_found(
    made: dict[str, Any], num_broken: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(broken_promises([made])) == num_broken
    print_tables([made])
    assert "slices" in capsys.readouterr().out

"""A start waits for memory of a device that a dead process still holds, and not for more."""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from vllm_dwdp.device import freed
from vllm_dwdp.device.freed import wait_until_freed
from vllm_dwdp.device.host import HostDevice

GIB = 2**30


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Freeing(HostDevice):
    """A device of which more and more is free; the last amount stays."""

    def __init__(self, *gib: float) -> None:
        super().__init__()
        self._gib = itertools.chain(gib, itertools.repeat(gib[-1]))

    def memory_info(self) -> tuple[int, int]:
        return int(next(self._gib) * GIB), 80 * GIB

    def users(self) -> str:
        return "GPU:0; process 77 uses 300.000 MB GPU memory"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(freed, "time", clock)
    return clock


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO, "vllm.dwdp"):
        yield lambda: [record.getMessage() for record in caplog.records]


def test_enough_is_not_waited_for(clock: Clock, lines: Any) -> None:
    wait_until_freed(Freeing(9), 9 * GIB, 1)
    assert (clock.now, lines()) == (0, [])


def test_it_waits_until_there_is_enough(clock: Clock, lines: Any) -> None:
    wait_until_freed(Freeing(1, 1, 2, 2, 9.5), 9 * GIB, 1)
    assert clock.now == 4 * freed.POLL_S
    assert lines() == [
        "DWDP rank 1 waits for memory of its device, which a dead process may still hold: "
        "1.00 GiB free, 9.00 GiB needed. GPU:0; process 77 uses 300.000 MB GPU memory",
        "DWDP rank 1 waited 1.0 s for memory of its device: 9.50 GiB free",
    ]


def test_what_stays_taken_is_not_waited_for_long(clock: Clock, lines: Any) -> None:
    wait_until_freed(Freeing(1, 2), 9 * GIB, 1)
    assert freed.STEADY_S <= clock.now <= freed.STEADY_S + 2 * freed.POLL_S
    assert lines()[-1] == (
        f"DWDP rank 1 waited {clock.now:.1f} s for memory of its device: 2.00 GiB free, "
        "9.00 GiB needed. GPU:0; process 77 uses 300.000 MB GPU memory"
    )


def test_a_trickle_has_a_deadline(clock: Clock) -> None:
    wait_until_freed(Freeing(*(index / 1e4 for index in range(1000))), 9 * GIB, 1)
    assert freed.WAIT_S <= clock.now <= freed.WAIT_S + freed.POLL_S


def test_the_host_says_how_much_memory_it_has() -> None:
    free, total = HostDevice().memory_info()
    assert 0 < free < total
    assert HostDevice().users() == ""

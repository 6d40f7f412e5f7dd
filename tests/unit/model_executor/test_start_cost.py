"""What a start took: no second counts twice, and every digest is counted."""

from typing import Any

import pytest

from vllm_dwdp.model_executor import start_cost
from vllm_dwdp.model_executor.start_cost import StartCost


def test_a_phase_within_another_stops_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 9.0, 20.0, 21.0])
    monkeypatch.setattr(start_cost.time, "monotonic", lambda: next(now))
    cost = StartCost()
    with cost.phase("map"), cost.phase("measure"):
        pass
    with cost.phase("map"):
        pass
    assert cost.seconds == {"load": 0, "meet": 0, "digest": 0, "map": 1 + 5 + 1, "measure": 3}


def test_a_phase_that_fails_ends() -> None:
    cost = StartCost()
    with pytest.raises(ValueError, match="no"), cost.phase("load"):
        raise ValueError("no")
    seconds = dict(cost.seconds)
    with cost.phase("meet"):
        pass
    assert cost.seconds["load"] == seconds["load"]


def test_digests_are_timed_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 5.0, 6.0])
    monkeypatch.setattr(start_cost.time, "monotonic", lambda: next(now))

    class Memory:
        def digest(self) -> bytes:
            return b"its digest"

    cost, memory = StartCost(), Memory()
    given: Any = memory
    with cost.phase("load"):
        assert cost.digest_of(given, 4096) == b"its digest"
    assert (cost.digested_bytes, cost.seconds["digest"], cost.seconds["load"]) == (4096, 3, 2 + 1)

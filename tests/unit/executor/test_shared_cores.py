"""Ranks tell each other their cores where they meet, and say which they share."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.launch import DwdpLaunch, RankSpan
from vllm_dwdp.distributed.meeting import make_abstract_endpoint
from vllm_dwdp.errors import RendezvousError
from vllm_dwdp.executor import shared_cores

LAUNCH = DwdpLaunch(
    config=DwdpConfig(group_size=2), ranks=RankSpan(1, 1, 4), endpoint=make_abstract_endpoint()
)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(
        shared_cores.logger, "warning", lambda text, *args: lines.append(text % args)
    )
    monkeypatch.delenv(shared_cores.BIND_ENV, raising=False)
    return lines


def announce(monkeypatch: pytest.MonkeyPatch, others: dict[tuple[int, int], Any]) -> dict[str, Any]:
    """Return what rank 1 says of itself once it has asked the others, each by its group and place."""

    def ask(endpoint: Any, group: int, rank: int, timeout_s: float) -> dict[str, Any]:
        assert endpoint is LAUNCH.endpoint and timeout_s > 0
        answer = others[group, rank]
        if isinstance(answer, Exception):
            raise answer
        return {"cores": answer}

    providers: list[Any] = []
    membership = SimpleNamespace(describe_by=providers.append)
    group: Any = SimpleNamespace(
        membership=membership, seat=LAUNCH.seat(1), status=lambda: {"rank": 1}
    )
    monkeypatch.setattr(shared_cores, "query_status", ask)
    shared_cores.announce_cores(group, {5, 4})
    (provider,) = providers
    return dict(provider())


def test_a_rank_names_those_that_compute_on_its_cores(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = RendezvousError("rank 0 of group 1 does not listen")
    others = {(0, 0): [3, 4], (1, 0): gone, (1, 1): [6, 7]}
    assert announce(monkeypatch, others) == {"rank": 1, "cores": [4, 5]}
    (line,) = said
    assert line.startswith("DWDP ranks 1 and 0 both compute on cores [4] and slow each other down.")
    assert "taskset" in line and "VLLM_CPU_OMP_THREADS_BIND" in line


def test_ranks_on_cores_of_their_own_say_nothing(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(monkeypatch, {(0, 0): [0, 1], (1, 0): [2], (1, 1): [3]})
    assert not said


def test_a_user_who_wants_no_binding_hears_nothing_of_shared_cores(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, shared_cores.BIND_ENV, "nobind")
    announce(monkeypatch, {})
    assert not said

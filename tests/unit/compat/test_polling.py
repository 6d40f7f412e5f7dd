"""The poller of a front end: what ranks say arrives, and an outage is said once."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.compat.frontend import polling
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.launch import DwdpLaunch, RankSpan
from vllm_dwdp.distributed.meeting import make_abstract_endpoint
from vllm_dwdp.distributed.membership import Membership

LAUNCH = DwdpLaunch(
    config=DwdpConfig(group_size=2), ranks=RankSpan(2, 1, 4), endpoint=make_abstract_endpoint()
)


class Sink:
    """What arrived."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, Any]]] = []

    def update(self, engine: int, status: dict[str, Any]) -> None:
        self.seen.append((engine, status))


class Said(logging.Handler):
    """Levels and texts of what the poller logged; vLLM's loggers may or may not propagate."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append((record.levelno, record.getMessage()))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, str]]]:
    handler = Said()
    monkeypatch.setattr(polling.logger, "level", logging.INFO)
    polling.logger.addHandler(handler)
    yield handler.seen
    polling.logger.removeHandler(handler)


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch, said: list[tuple[int, str]]) -> Iterator[Sink]:
    monkeypatch.setattr(polling, "INTERVAL_S", 0.02)
    made = Sink()
    poller = polling.StatusPoller(LAUNCH, [2], made)
    yield made
    poller.close()


def rank(group: int = 1, **status: Any) -> Membership:
    """Rank 2 of the deployment, which is the first of the second group."""
    member = Membership.join(
        LAUNCH.endpoint,
        group=group,
        dwdp_rank=0,
        group_size=2,
        fingerprint=fingerprint(),
        join_timeout_s=1,
    )
    member.describe_by(lambda: status)
    return member


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_outage_is_said_once_and_so_is_its_end(sink: Sink, said: list[tuple[int, str]]) -> None:
    for round_ in range(1, 3):
        wait_until(lambda: len(said) == 2 * round_ - 1)  # noqa: B023
        time.sleep(0.2)  # further polls fail, and say nothing
        with rank(resident_expert_bytes=round_):
            wait_until(lambda: bool(sink.seen))
            assert sink.seen[-1][0] == 2
            assert sink.seen[-1][1]["resident_expert_bytes"] == round_
            assert len(said) == 2 * round_
        sink.seen.clear()
    wait_until(lambda: len(said) == 5)
    levels, texts = zip(*said, strict=True)
    assert levels == (logging.WARNING, logging.INFO) * 2 + (logging.WARNING,)
    assert "DWDP rank 2 does not report its metrics" in texts[0] and "does not listen" in texts[0]
    assert texts[1] == "DWDP rank 2 reports its metrics again"


def test_workers_of_a_rank_are_one_engine(
    monkeypatch: pytest.MonkeyPatch, said: list[tuple[int, str]]
) -> None:
    """Ranks of two workers: those of rank 2 are in groups 2 and 3."""
    monkeypatch.setattr(polling, "INTERVAL_S", 0.02)
    sink = Sink()
    poller = polling.StatusPoller(replace(LAUNCH, tensor_parallel_size=2), [2], sink)
    try:
        with rank(group=2, resident_expert_bytes=3):
            wait_until(lambda: bool(said))
            assert "DWDP rank 2 (tensor rank 1) does not report its metrics" in said[0][1]
            with rank(group=3, resident_expert_bytes=4):
                wait_until(lambda: bool(sink.seen))
    finally:
        poller.close()
    engine, status = sink.seen[0]
    assert engine == 2
    assert status["resident_expert_bytes"] == 7 and status["group"] == 1


def test_a_rank_that_has_no_experts_yet_is_no_outage(
    monkeypatch: pytest.MonkeyPatch, said: list[tuple[int, str]]
) -> None:
    monkeypatch.setattr(polling, "INTERVAL_S", 0.02)
    asked = 0

    def count() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return {}

    sink = Sink()
    with rank() as member:
        member.describe_by(count)
        poller = polling.StatusPoller(LAUNCH, [2], sink)
        wait_until(lambda: asked >= 3)
        poller.close()
    assert said == [] and sink.seen == []

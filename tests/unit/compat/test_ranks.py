"""The ranks of every kind of front end, where they meet, and what vLLM is told of them."""

import atexit
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dwdp.compat.frontend import ranks
from vllm_dwdp.compat.frontend.ranks import StartedRanks, choose_endpoint, find_ranks, uncouple
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.launch import SHARED_CORES_ENV, DwdpLaunch, RankSpan
from vllm_dwdp.distributed.meeting import make_abstract_endpoint, parse_endpoint
from vllm_dwdp.errors import DwdpConfigError

CONFIG = DwdpConfig(group_size=2)
TOGETHER = StartedRanks(span=RankSpan(0, 2, 2), one_by_one=False)
ALONE = StartedRanks(span=RankSpan(1, 1, 2), one_by_one=True)


@pytest.fixture(autouse=True)
def any_core_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the tests themselves are confined."""
    monkeypatch.setattr(ranks, "is_confined", lambda: False)
    monkeypatch.delenv(SHARED_CORES_ENV, raising=False)


def parallel(size: int, **changes: Any) -> SimpleNamespace:
    facts = {
        "data_parallel_size": size,
        "data_parallel_size_local": size,
        "data_parallel_rank": 0,
        "data_parallel_index": 0,
        "data_parallel_rank_local": 0,
        "data_parallel_external_lb": False,
        "data_parallel_hybrid_lb": False,
        "data_parallel_backend": "mp",
    }
    return SimpleNamespace(**facts | changes)


def front_end(num_servers: int = 1, number: int = -1, **changes: Any) -> SimpleNamespace:
    facts = {"_api_process_count": num_servers, "_api_process_rank": number}
    return SimpleNamespace(**facts | changes)


@pytest.mark.parametrize(
    ("given", "made", "headless", "span", "one_by_one"),
    [
        (4, parallel(4), False, RankSpan(0, 4, 4), False),
        (4, parallel(4, data_parallel_size_local=2), False, RankSpan(0, 2, 4), True),
        (
            4,
            parallel(4, data_parallel_rank=2, data_parallel_size_local=2),
            True,
            RankSpan(2, 2, 4),
            True,
        ),
        (
            4,
            parallel(4, data_parallel_size_local=2, data_parallel_backend="ray"),
            False,
            RankSpan(0, 4, 4),
            False,
        ),  # Ray starts them, also on other hosts
        (1, parallel(1), False, RankSpan(0, 4, 4), False),  # one offline LLM of four ranks
        (1, parallel(4, data_parallel_rank=3), False, RankSpan(3, 1, 4), True),  # SPMD
        (
            4,
            parallel(4, data_parallel_rank=1, data_parallel_size_local=1),
            False,
            RankSpan(1, 1, 4),
            True,
        ),
        (
            4,
            parallel(4, data_parallel_rank=2, data_parallel_size_local=2),
            False,
            RankSpan(2, 2, 4),
            True,
        ),
    ],
)
def test_a_front_end_finds_its_ranks(
    given: int, made: SimpleNamespace, headless: bool, span: RankSpan, one_by_one: bool
) -> None:
    args, config = SimpleNamespace(data_parallel_size=given), SimpleNamespace(parallel_config=made)
    started = find_ranks(args, config, 4, headless=headless)
    assert (started.span, started.one_by_one) == (span, one_by_one)


@pytest.mark.parametrize(
    ("given", "made", "confined", "shared", "slots"),
    [
        (4, parallel(4, data_parallel_rank=1, data_parallel_size_local=1), True, False, [(0, 1)]),
        (4, parallel(4, data_parallel_rank=1, data_parallel_size_local=1), False, False, [(1, 4)]),
        (4, parallel(4, data_parallel_rank=1, data_parallel_size_local=1), True, True, [(1, 4)]),
        (
            4,
            parallel(4, data_parallel_rank=2, data_parallel_size_local=2),
            True,
            False,
            [(0, 2), (1, 2)],
        ),
        (4, parallel(4), True, False, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (1, parallel(4, data_parallel_rank=3), True, False, [(3, 4)]),  # SPMD: of one parent
    ],
)
def test_ranks_divide_the_cores_of_their_front_end_or_of_all(
    monkeypatch: pytest.MonkeyPatch,
    given: int,
    made: SimpleNamespace,
    confined: bool,
    shared: bool,
    slots: list[tuple[int, int]],
) -> None:
    """A server that is kept off some cores has the others to itself, unless it is told otherwise."""
    monkeypatch.setattr(ranks, "is_confined", lambda: confined)
    if shared:
        monkeypatch.setenv(SHARED_CORES_ENV, "1")
    args, config = SimpleNamespace(data_parallel_size=given), SimpleNamespace(parallel_config=made)
    span = find_ranks(args, config, 4, headless=False).span
    launch = DwdpLaunch(config=CONFIG, ranks=span, endpoint=make_abstract_endpoint())
    assert [(*seat.core_slots, seat.num_core_slots) for seat in launch.seats] == slots


@pytest.mark.parametrize(
    ("given", "size", "count"),
    [(parallel(1), 4, 4), (parallel(4, data_parallel_rank=3), 1, 1)],
)
def test_an_offline_llm_knows_of_the_ranks_that_it_drives(
    given: SimpleNamespace, size: int, count: int
) -> None:
    args, config = SimpleNamespace(data_parallel_size=1), SimpleNamespace(parallel_config=given)
    uncouple(given, find_ranks(args, config, 4, headless=False))
    assert (given.data_parallel_size, given.data_parallel_size_local) == (size, count)


def test_a_server_is_told_nothing_else_than_stock_vllm_told_it() -> None:
    for changes in ({}, {"data_parallel_rank": 1, "data_parallel_size_local": 1}):
        made = parallel(4, **changes)
        before = vars(made).copy()
        args = SimpleNamespace(data_parallel_size=4)
        config = SimpleNamespace(parallel_config=made)
        uncouple(made, find_ranks(args, config, 4, headless=False))
        assert vars(made) == before


def test_api_servers_meet_where_their_parent_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ranks.ENDPOINT_ENV, raising=False)
    made = choose_endpoint(front_end(), CONFIG, TOGETHER)
    assert choose_endpoint(front_end(2, number=1), CONFIG, TOGETHER) == made
    assert choose_endpoint(front_end(), CONFIG, TOGETHER) != made, "another deployment"


def test_ranks_started_one_by_one_must_be_told_where_to_meet() -> None:
    with pytest.raises(
        DwdpConfigError, match=r"rendezvous is missing.*-multi-port-external-lb\) must.*unix:///"
    ):
        choose_endpoint(front_end(), CONFIG, ALONE)
    given = DwdpConfig(group_size=2, rendezvous="unix:///run/meet")
    assert choose_endpoint(front_end(), given, ALONE) == parse_endpoint("unix:///run/meet")
    replica = DwdpConfig(group_size=2, mode="replica")
    choose_endpoint(front_end(), replica, ALONE)


def test_names_of_killed_ranks_go_when_the_front_end_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM stops its workers with SIGKILL; what lies in the folder of another rank is not touched."""
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", lambda run, *args: at_exit.append(lambda: run(*args)))
    endpoint = parse_endpoint(f"unix://{tmp_path}/meet")
    launch = DwdpLaunch(config=CONFIG, ranks=RankSpan(0, 2, 4), endpoint=endpoint)
    ranks.forget_ranks_at_exit(launch)
    for group, rank in ((0, 0), (1, 0)):
        killed = endpoint.listen(group, rank)
        os.close(killed.detach())
    living = endpoint.listen(0, 1)
    for run in at_exit:
        run()
    names = sorted(path.name for path in (tmp_path / "meet").iterdir())
    assert names == ["g0-r1.sock", "g1-r0.sock"]
    living.close()
    abstract = DwdpLaunch(config=CONFIG, ranks=RankSpan(0, 2, 4), endpoint=make_abstract_endpoint())
    ranks.forget_ranks_at_exit(abstract)
    assert len(at_exit) == 1, "abstract names vanish with their process"

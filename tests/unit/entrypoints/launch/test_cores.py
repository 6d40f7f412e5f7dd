"""What the ranks of a launch are told of their cores."""

import os

import pytest

from vllm_dwdp.distributed.launch import SHARED_CORES_ENV
from vllm_dwdp.entrypoints.launch.cores import BIND_ENV, cores_for_each, physical_cores
from vllm_dwdp.errors import DwdpConfigError

SHARED = {SHARED_CORES_ENV: "1"}


@pytest.mark.parametrize(
    ("environment", "num_ranks", "expected"),
    [
        ({}, 2, [SHARED, SHARED]),
        ({BIND_ENV: "auto"}, 2, [SHARED, SHARED]),
        ({BIND_ENV: "nobind"}, 2, [SHARED, SHARED]),
        ({BIND_ENV: "0-3"}, 1, [SHARED]),
        ({BIND_ENV: "0-3|4,6"}, 2, [SHARED | {BIND_ENV: "0-3"}, SHARED | {BIND_ENV: "4,6"}]),
    ],
)
def test_ranks_divide_the_cores_or_get_those_that_are_named_for_them(
    environment: dict[str, str], num_ranks: int, expected: list[dict[str, str]]
) -> None:
    assert cores_for_each(num_ranks, environment) == expected


def test_a_rank_of_several_workers_gets_a_list_for_each() -> None:
    found = cores_for_each(2, {BIND_ENV: "0|1|2-3|4|5"}, decode_workers=[1], workers_of_a_rank=2)
    assert [each[BIND_ENV] for each in found] == ["0|1", "2-3|4", "5"]
    with pytest.raises(DwdpConfigError, match=r"one list for each of the 2 workers of each rank"):
        cores_for_each(2, {BIND_ENV: "0|1"}, workers_of_a_rank=2)


@pytest.mark.parametrize(("named", "num_lists"), [("0-3", 1), ("0|1|2", 3)])
def test_cores_for_another_number_of_ranks_are_refused(named: str, num_lists: int) -> None:
    problem = rf"names cores for {num_lists} ranks, and --ranks is 2\. Give one list for each rank"
    with pytest.raises(DwdpConfigError, match=problem):
        cores_for_each(2, {BIND_ENV: named})


def lists(num_ranks: int, decode_workers: list[int], num_cores: int) -> list[str]:
    made = cores_for_each(num_ranks, {}, decode_workers, range(num_cores))
    assert all(each[SHARED_CORES_ENV] == "1" for each in made)
    return [each.get(BIND_ENV, "") for each in made]


@pytest.mark.parametrize(
    ("num_ranks", "decode_workers", "num_cores", "expected"),
    [
        (2, [1], 6, ["0,1", "2,3", "4,5"]),
        (2, [1], 3, ["0", "1", "2"]),
        (2, [2], 4, ["0", "1", "2|3"]),
        (2, [1], 2, ["", "", "1"]),
        (2, [1, 1], 2, ["", "", "0", "1"]),
        (2, [2], 3, ["", "", "1|2"]),
        (2, [1], 1, ["", "", "0"]),
    ],
)
def test_decode_servers_do_not_compute_on_the_cores_of_ranks_while_there_are_enough(
    num_ranks: int, decode_workers: list[int], num_cores: int, expected: list[str]
) -> None:
    """A stock server on all cores waits in every step for those on which a rank computes."""
    assert lists(num_ranks, decode_workers, num_cores) == expected


def test_where_gpus_compute_nobody_is_bound() -> None:
    assert cores_for_each(2, {}, [1], []) == [SHARED, SHARED, SHARED]


def test_cores_of_this_machine_are_some_that_we_may_use() -> None:
    found = physical_cores()
    assert found and set(found) <= os.sched_getaffinity(0) and len(set(found)) == len(found)

"""What the ranks of a launch are told of their cores."""

import pytest

from vllm_dwdp.distributed.launch import SHARED_CORES_ENV
from vllm_dwdp.entrypoints.launch.cores import BIND_ENV, cores_for_each
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


@pytest.mark.parametrize(("named", "num_lists"), [("0-3", 1), ("0|1|2", 3)])
def test_cores_for_another_number_of_ranks_are_refused(named: str, num_lists: int) -> None:
    problem = rf"names cores for {num_lists} ranks, and --ranks is 2\. Give one list for each rank"
    with pytest.raises(DwdpConfigError, match=problem):
        cores_for_each(2, {BIND_ENV: named})

"""One status of a rank of several workers."""

from typing import Any

import pytest

from vllm_dwdp.distributed.status import status_of_rank

WORKER: dict[str, Any] = {
    "rank": 1,
    "group": 6,
    "mode": "prefetch",
    "steps": {"prefetch": 9},
    "resident_expert_bytes": 10,
    "fetched_bytes": {"0": 5, "2": 7},
    "late_prefetches": 1,
    "prefetch_copy_seconds": 2.0,
    "start_seconds": {"load": 3.0, "meet": 1.0},
    "generation": 100,
    "peers": {"0": "ready", "2": "published"},
}
OTHER = WORKER | {
    "group": 7,
    "resident_expert_bytes": 11,
    "fetched_bytes": {"0": 6},
    "late_prefetches": 0,
    "prefetch_copy_seconds": None,
    "start_seconds": {"load": 2.0, "meet": 4.0},
    "generation": 105,
    "peers": {"0": "dead", "2": "ready"},
}


@pytest.mark.feature("Tensor parallelism inside a rank")
def test_a_rank_is_what_its_workers_are_together() -> None:
    found = status_of_rank([WORKER, OTHER])
    assert found == WORKER | {
        "group": 3,
        "resident_expert_bytes": 21,
        "fetched_bytes": {"0": 11, "2": 7},
        "start_seconds": {"load": 3.0, "meet": 4.0},
        "generation": 105,
        "peers": {"0": "dead", "2": "published"},
    }


def test_the_only_worker_of_a_rank_speaks_for_it() -> None:
    assert status_of_rank([WORKER]) == WORKER


def test_what_no_worker_measures_stays_unknown() -> None:
    assert status_of_rank([OTHER, OTHER])["prefetch_copy_seconds"] is None

"""Shared memory for worker processes, which a container may have too little of."""

from typing import Any

import pytest

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.entrypoints.doctor.checks import (
    examine,
    judge_worker_queues,
)
from vllm_dwdp.entrypoints.doctor.queues import WORKER_QUEUE_BYTES, check_queues
from vllm_dwdp.entrypoints.launch.launcher import with_worker_processes
from vllm_dwdp.errors import DwdpConfigError


def test_dockers_shared_memory_is_too_small_for_worker_processes() -> None:
    docker = judge_worker_queues(64 * 2**20, ranks_have_some=True)
    assert docker.verdict == "problem" and docker.seen == "64 MiB free in /dev/shm"
    assert "--shm-size" in docker.advice and "'uni' needs none" in docker.advice
    of_decode_servers = judge_worker_queues(64 * 2**20, ranks_have_some=False)
    assert "--shm-size" in of_decode_servers.advice and "uni" not in of_decode_servers.advice
    assert judge_worker_queues(2**30, ranks_have_some=True).verdict == "ok"


@pytest.mark.parametrize(
    ("settings", "is_checked"),
    [
        ({"executor": "uni"}, False),
        ({"executor": "mp"}, True),
        ({"executor": "uni", "tensor_parallel_size": 2}, True),
        ({"executor": "uni", "decode_servers": 1}, True),
    ],
)
def test_shared_memory_matters_to_worker_processes_only(
    settings: dict[str, Any], is_checked: bool
) -> None:
    findings = examine(group_size=2, expert_bytes=0, **settings)
    assert ("shared memory" in [finding.check for finding in findings]) is is_checked


@pytest.mark.parametrize(
    ("settings", "who"),
    [
        (({}, 1, [], 0), ""),
        (({"executor": "mp"}, 1, [], 0), "ranks"),
        (({}, 2, [], 4), "ranks"),
        (({}, 1, [1], 0), "decode servers"),
        (({}, 1, [1], 4), ""),
        (({}, 2, [2], 8), "ranks and decode servers"),
    ],
)
def test_launch_knows_who_has_worker_processes(settings: tuple[Any, ...], who: str) -> None:
    options, *others = settings
    assert with_worker_processes(DwdpConfig.from_options(options, 2), *others) == who


def test_launch_says_what_to_mount_before_anything_starts() -> None:
    with pytest.raises(DwdpConfigError, match=r"decode servers .* 64 MiB .* 240 MiB .*shm-size"):
        check_queues("decode servers", 64 * 2**20)
    check_queues("decode servers", WORKER_QUEUE_BYTES)

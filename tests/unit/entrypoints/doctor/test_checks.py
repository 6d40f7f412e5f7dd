"""What `doctor` makes of kernels, containers and limits that are not here."""

import os
import resource
from pathlib import Path

import pytest

from tests.unit.entrypoints.doctor.findings import verdicts
from vllm_dwdp.device.container import Limits, read_limits
from vllm_dwdp.device.limits import check_open_files, files_needed
from vllm_dwdp.entrypoints.doctor.checks import (
    judge_container,
    judge_open_files,
    judge_scheduler,
)
from vllm_dwdp.errors import DwdpMemoryError


@pytest.mark.parametrize(
    ("release", "verdict"),
    [
        ("6.18.44-fc-v669", "warning"),
        ("6.18.0", "warning"),
        ("6.18.45+", "ok"),
        ("6.18.50-amd64", "ok"),
        ("6.17.9-amd64", "warning"),
        ("6.19.2", "warning"),
        ("6.12.90", "ok"),
        ("7.0-rc1", "ok"),
        ("7.0.1+", "ok"),
    ],
)
def test_kernels_that_starve_their_own_threads(release: str, verdict: str) -> None:
    finding = judge_scheduler(release)
    assert (finding.verdict, bool(finding.advice)) == (verdict, verdict != "ok")
    assert release in finding.seen


@pytest.mark.parametrize("group_size", [2, 72])
@pytest.mark.parametrize("spare", [-1, 0])
def test_open_files_are_a_problem_exactly_where_a_start_is_refused(
    group_size: int, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_open = len(os.listdir("/proc/self/fd"))
    hard = num_open + files_needed(group_size) + spare
    monkeypatch.setattr(resource, "getrlimit", lambda _: (hard, hard))
    finding = judge_open_files(hard, hard, num_open, group_size)
    assert finding.advice
    if spare < 0:
        assert finding.verdict == "problem"
        with pytest.raises(DwdpMemoryError):
            check_open_files(files_needed(group_size), "a group")
    else:
        assert finding.verdict == "warning"
        check_open_files(files_needed(group_size), "a group")


@pytest.mark.parametrize("hard", [4096 + 4 * 2, resource.RLIM_INFINITY])
def test_enough_open_files(hard: int) -> None:
    assert judge_open_files(1024, hard, 5, 2).verdict == "ok"
    assert judge_open_files(1024, 4096, 5, 2).verdict == "warning"


def test_no_cgroups_are_no_limits(tmp_path: Path) -> None:
    assert read_limits(tmp_path, tmp_path / "missing") == Limits()
    assert verdicts(judge_container(Limits(), 8, 2**40)) == {}


def test_containers_that_are_too_small() -> None:
    limits = Limits(memory_bytes=2**30, num_tasks=100, num_cpus=0.5)
    assert verdicts(judge_container(limits, 2, 2**31)) == {
        "container memory": "problem",
        "container tasks": "warning",
        "container CPUs": "warning",
    }
    enough = Limits(memory_bytes=2**33, num_tasks=1000, num_cpus=4.0)
    assert verdicts(judge_container(enough, 2, 2**31)) == {}

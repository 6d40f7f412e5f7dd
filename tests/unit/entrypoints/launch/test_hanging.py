"""Starts that hang: ended by launch, told, and given up."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.waiting import wait_until
from tests.unit.entrypoints.launch.children import made_child, poll_until, poll_while
from tests.unit.entrypoints.launch.fakes import interrupt, kill_named, run
from vllm_dwdp.entrypoints.launch import child
from vllm_dwdp.entrypoints.launch.plan import LaunchPlan
from vllm_dwdp.errors import DwdpError

pytestmark = pytest.mark.timeout(60)


def test_a_start_that_hangs_is_ended_and_told_and_given_up(
    fakes: LaunchPlan, tmp_path: Path
) -> None:
    """Two of three times a rank that really hangs: stopped, so that it cannot even end."""
    (tmp_path / "rank1-wait").touch()
    (tmp_path / "rank1-says").write_text("waits for ranks [0]")
    pids: list[int] = []

    def react(line: str, lines: list[str]) -> None:
        if line.startswith("rank 1: starting, pid") and line.count(":") == 1:
            pids.append(int(line.partition("pid ")[2].partition(",")[0]))
            log = tmp_path / "logs" / "rank1.log"
            wait_until(lambda: log.read_text().count("loads") == len(pids))
            if len(pids) > 1:
                os.kill(pids[-1], signal.SIGSTOP)

    hangs = replace(fakes, start_timeout_s=0.3)
    told: list[str] = []
    with pytest.raises(DwdpError) as given_up:
        run(hangs, tmp_path, lambda line, lines: (told.append(line), react(line, lines))[0])
    why = "did not serve within 0.3 s; waits for ranks [0]; last wrote: loads"
    assert [line for line in told if "hung" in line] == [
        f"rank 1: hung and was ended, starts again in {backoff} s, restarts {count}: {why}"
        for count, backoff in ((1, "0.05"), (2, "0.1"), (3, "0.2"))
    ]
    assert str(given_up.value) == f"rank 1 ended before it ever served: {why}\nloads\n"
    assert len(pids) == 3


def test_what_one_that_hangs_said_last_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "PROGRESS_INTERVAL_S", 0.01)
    monkeypatch.setattr(child, "QUIET_S", 0.0)
    log = tmp_path / "log"
    hangs = made_child(log, "sh", "-c", "echo first; echo second; exec sleep 60", doing="maps")
    hangs.start_timeout_s = 60.0
    poll_while(hangs, lambda: hangs.doing != "maps" or "second" not in log.read_text())
    hangs.progress = str
    poll_while(hangs, lambda: hangs.doing != "last wrote: second")
    hangs.start_timeout_s = 0.0
    monkeypatch.setattr(hangs, "_serves_by", 0.0)
    poll_until(hangs, "hung and was ended, starts again in 1 s")
    assert hangs.failure == (
        "did not serve within 0 s; says nothing any more, and last: maps; last wrote: second"
    )


def test_a_rank_that_hangs_when_it_comes_back_is_started_once_more(
    fakes: LaunchPlan, tmp_path: Path
) -> None:
    waits = tmp_path / "rank1-wait"

    def react(line: str, lines: list[str]) -> None:
        if line.startswith("all 2 ranks") and waits.exists():
            raise AssertionError("it waits")
        if line.startswith("all 2 ranks") and "hung" in "".join(lines):
            interrupt()
        elif line.startswith("all 2 ranks"):
            waits.touch()
            kill_named(next(line for line in lines if line.startswith("rank 1: serving")))
        elif "hung" in line:
            assert line.startswith("rank 1: hung and was ended, starts again in ")
            waits.unlink()

    lines = run(replace(fakes, start_timeout_s=4.0), tmp_path, react)
    assert sum("hung" in line for line in lines) == 1

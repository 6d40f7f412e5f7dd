"""Forks of a process with vLLM behave as interpreters that were started anew."""

import signal
from pathlib import Path

import psutil
import pytest

from tests.helpers.engines import Fork, fork

pytestmark = pytest.mark.e2e


def end(process: Fork) -> int:
    try:
        return process.wait(timeout=60)
    finally:
        process.kill()


def first_line(log: Path) -> str:
    """Return what a program wrote, without what libraries say at its exit."""
    return log.read_text().partition("\n")[0]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("raise ValueError('as any program')", 1),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM),
    ],
)
def test_the_end_of_a_program_is_reported(tmp_path: Path, code: str, expected: int) -> None:
    assert end(fork(["-c", code], tmp_path / "log")) == expected


def test_a_program_has_its_own_log_environment_and_arguments(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['MINE'], sys.argv[1:], __name__)\nraise SystemExit"
    forks = [
        fork(["-c", code, f"argument {mine}"], tmp_path / mine, {"MINE": mine}) for mine in "ab"
    ]
    assert [end(process) for process in forks] == [0, 0]
    for mine in "ab":
        assert first_line(tmp_path / mine) == f"{mine} ['argument {mine}'] __main__"


def test_a_program_begins_without_threads_plugins_and_open_files(tmp_path: Path) -> None:
    code = (
        "import os, sys, threading; import vllm.v1.engine.llm_engine; "
        "print(len(os.listdir('/proc/self/task')), 'vllm_dwdp.executor' in sys.modules, "
        "[fd for fd in os.listdir('/proc/self/fd') if 'socket' in os.path.realpath("
        "f'/proc/self/fd/{fd}')])"
    )
    forks = [fork(["-c", code], tmp_path / str(number)) for number in range(3)]
    assert [end(process) for process in forks] == [0, 0, 0]
    for number in range(3):
        assert first_line(tmp_path / str(number)) == "1 False []"


def test_ranks_next_to_each_other_share_neither_hashes_nor_addresses(tmp_path: Path) -> None:
    """A rank that took a peer's address for its own would otherwise go unnoticed."""
    code = "import sys; print(hash('expert'), id(sys.modules))"
    for rank in (0, 1):
        assert end(fork(["-c", code], tmp_path / str(rank), rank=rank)) == 0
    hashes, addresses = zip(
        *(first_line(tmp_path / str(rank)).split() for rank in (0, 1)), strict=True
    )
    assert hashes[0] != hashes[1] and addresses[0] != addresses[1]


def test_whatever_a_killed_program_started_is_killed_too(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; "
        "print(subprocess.Popen(['sleep', '300']).pid, flush=True); time.sleep(300)"
    )
    process = fork(["-c", code], tmp_path / "log")
    with pytest.raises(TimeoutError):
        process.wait(timeout=2)
    child = psutil.Process(int((tmp_path / "log").read_text()))
    process.kill()
    assert not psutil.pid_exists(process.pid)
    assert not psutil.wait_procs([child], timeout=20)[1]

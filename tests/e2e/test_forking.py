"""Ranks that are forked from one process with vLLM are children of whoever asked, and nobody else's.

A rank is made to wait before it starts an engine: its configuration file is a named pipe.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.helpers.waiting import wait_until
from vllm_dwdp.entrypoints.launch import forking
from vllm_dwdp.entrypoints.launch.forking import Ranks, Template, forked_ranks, is_vllm_of_ours
from vllm_dwdp.entrypoints.launch.process import ForkedProcess, Process, reap_group

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

VLLM = str(Path(sys.executable).with_name("vllm"))


class Stage:
    """Forked ranks, what was reported of them, and a folder for their logs."""

    def __init__(self, ranks: Ranks, folder: Path, lines: list[str]) -> None:
        self.ranks = ranks
        self.folder = folder
        self.lines = lines
        self.started: list[Process] = []
        self.pipes: list[int] = []

    def start(
        self, name: str, *arguments: str, changes: Mapping[str, str] | None = None
    ) -> Process:
        with (self.folder / name).open("ab") as output:
            environment = os.environ | (changes or {})
            process = self.ranks.start([VLLM, *arguments], output, environment)
        self.started.append(process)
        return process

    def start_waiting(self, name: str) -> Process:
        """Return a server that waits for somebody to write its configuration."""
        pipe = self.folder / f"{name}.yaml"
        os.mkfifo(pipe)
        process = self.start(name, "serve", "--config", str(pipe))
        wait_until(lambda: self._opened_by_reader(pipe))
        return process

    def _opened_by_reader(self, pipe: Path) -> bool:
        """Whether the server reads it; it reads on until we close it."""
        with suppress(OSError):
            self.pipes.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            return True
        return False

    def log(self, name: str) -> str:
        return (self.folder / name).read_text()

    def close(self) -> None:
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=20)
            reap_group(process.pid)
        for pipe in self.pipes:
            os.close(pipe)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder, lines = tmp_path_factory.mktemp("forking"), []
    with forked_ranks(folder / "template.log", lines.append) as ranks:
        ranks.wait_until_ready([])
        assert not lines
        made = Stage(ranks, folder, lines)
        try:
            yield made
        finally:
            made.close()


def template_of(stage: Stage) -> Template:
    assert stage.ranks._template is not None
    return stage.ranks._template


def test_its_end_is_ours_to_see(stage: Stage) -> None:
    good, bad = stage.start("good", "--version"), stage.start("bad", "serve", "--no-such-option")
    assert isinstance(good, ForkedProcess) and isinstance(bad, ForkedProcess)
    assert (good.wait(timeout=60), bad.wait(timeout=60)) == (0, 2)
    assert "0.3" in stage.log("good")
    assert "--no-such-option" in stage.log("bad")
    assert good.poll() == good.returncode == 0


def test_it_begins_as_a_program_that_was_started_here(stage: Stage) -> None:
    process = stage.start_waiting("begin")
    seen = psutil.Process(process.pid)
    assert seen.ppid() == os.getpid()
    assert os.getsid(process.pid) == process.pid
    assert "vllm serve --config" in " ".join(seen.cmdline())
    assert seen.cwd() == os.getcwd()
    files = {os.path.realpath(f"/proc/{process.pid}/fd/{number}") for number in (1, 2)}
    assert files == {str(stage.folder / "begin")}
    others = [path for path in open_files(process.pid) if "socket:" in path]
    assert not others, "nothing of the process that forked it"
    (engine,) = [child for child in seen.children() if "tracker" not in " ".join(child.cmdline())]
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == -signal.SIGTERM
    wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
    reap_group(process.pid)
    assert not psutil.pid_exists(engine.pid)


def open_files(pid: int) -> list[str]:
    return [os.path.realpath(path) for path in Path(f"/proc/{pid}/fd").iterdir()]


def test_it_has_the_environment_of_its_request(stage: Stage) -> None:
    for width in ("60", "120"):
        stage.start(width, "serve", "--help", changes={"COLUMNS": width}).wait(timeout=60)
    narrow, wide = (len(stage.log(width).splitlines()) for width in ("60", "120"))
    assert narrow > wide > 5


def test_what_is_read_while_loading_needs_a_program_of_its_own(stage: Stage) -> None:
    with (stage.folder / "own").open("ab") as output:
        process = stage.ranks.start(["/bin/true"], output, os.environ | {"OMP_NUM_THREADS": "7"})
    assert isinstance(process, subprocess.Popen)
    assert process.wait(timeout=20) == 0


def test_a_rank_outlives_the_process_that_forked_it(stage: Stage) -> None:
    process, first = stage.start_waiting("outlives"), template_of(stage).process
    first.kill()
    first.wait(timeout=20)
    with (stage.folder / "beside").open("ab") as output:
        beside = stage.ranks.start(["/bin/true"], output, os.environ)
    assert isinstance(beside, subprocess.Popen), "a rank does not wait for another template"
    assert process.poll() is None
    assert stage.lines.pop().startswith(
        "the process that forks ranks is replaced: it ended with -9"
    )
    stage.ranks.wait_until_ready([])
    again = stage.start("again", "--version")
    assert isinstance(again, ForkedProcess)
    assert (beside.wait(timeout=20), again.wait(timeout=60)) == (0, 0)


DRIVER = """
import os, sys, time
from pathlib import Path
from vllm_dwdp.entrypoints.launch.forking import forked_ranks
folder = Path(sys.argv[1])
os.mkfifo(folder / "c.yaml")
with forked_ranks(folder / "template.log", print) as ranks:
    ranks.wait_until_ready([])
    with (folder / "log").open("ab") as output:
        command = [sys.argv[2], "serve", "--config", str(folder / "c.yaml")]
        process = ranks.start(command, output, os.environ)
    print(process.pid, ranks._template.process.pid, flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
def test_a_rank_ends_with_the_launch_that_is_killed(tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), VLLM], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    with driver.stdout:
        pids = [int(word) for word in driver.stdout.readline().split()]
    assert len(pids) == 2 and all(map(psutil.pid_exists, pids))
    driver.kill()
    driver.wait(timeout=20)
    for pid in pids:
        wait_until(lambda pid=pid: has_ended(pid))
        reap_group(pid)


def has_ended(pid: int) -> bool:
    """Whether nothing of it is left but an exit code, which is ours to take if we adopt orphans."""
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return True


def test_where_it_cannot_fork_ranks_start_as_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(Template):
        def wait_until_ready(self, timeout_s: float) -> bool:
            raise forking.ForkingError("importing vLLM started 2 threads")

    monkeypatch.setattr(forking, "Template", Refusing)
    lines: list[str] = []
    with forked_ranks(tmp_path / "template.log", lines.append) as ranks:
        ranks.wait_until_ready([])
        assert lines == [
            "ranks start as programs of their own, not as forks: importing vLLM started 2 threads"
        ]
        with (tmp_path / "log").open("ab") as output:
            process = ranks.start(["/bin/true"], output, os.environ)
        assert isinstance(process, subprocess.Popen)
        assert process.wait(timeout=20) == 0


def test_a_process_that_dies_while_it_imports_is_not_replaced(tmp_path: Path) -> None:
    lines: list[str] = []
    with forked_ranks(tmp_path / "template.log", lines.append) as ranks:
        assert ranks._template is not None
        ranks._template.process.kill()
        started = time.monotonic()
        ranks.wait_until_ready([])
        assert time.monotonic() - started < 10
    (line,) = lines
    assert line.startswith("ranks start as programs of their own, not as forks: it ended with -9")


def test_only_the_vllm_of_this_environment_is_forked(tmp_path: Path) -> None:
    assert is_vllm_of_ours(VLLM)
    assert not is_vllm_of_ours(str(tmp_path / "vllm"))

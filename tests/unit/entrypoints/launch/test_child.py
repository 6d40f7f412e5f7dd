"""A child of launch: its states, restarts, end, and the last error of its log."""

import shlex
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.unit.entrypoints.launch.children import made_child, poll_until, poll_while
from tests.unit.entrypoints.launch.fakes import PYTHON
from vllm_dwdp.entrypoints.launch import child

pytestmark = pytest.mark.timeout(60)


def test_backoff_doubles_up_to_a_limit_and_starts_anew_after_a_good_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(child, "LONGEST_BACKOFF_S", 0.05)
    monkeypatch.setattr(child, "SETTLED_S", 0.1)
    ends = made_child(tmp_path / "log", *PYTHON, "-c", "raise SystemExit(3)")
    states = []
    for _ in range(4):
        poll_until(ends, "starting")
        poll_until(ends, "ended")
        states.append(ends.state)
    assert states == [
        f"ended with 3, starts again in {backoff} s" for backoff in ("0.02", "0.04", "0.05", "0.05")
    ]
    assert ends.num_restarts == 4
    for life_s, backoff in ((0.0, "0.05"), (0.15, "0"), (0.0, "0.02"), (0.0, "0.04")):
        ends.command, ends.is_ready = (lambda: ["sleep", "60"]), lambda: True
        poll_until(ends, "serving")
        time.sleep(life_s)
        assert ends.process is not None
        ends.process.kill()
        poll_until(ends, "killed")
        assert ends.state == f"killed by SIGKILL, starts again in {backoff} s"


def test_states_of_a_living_child(tmp_path: Path) -> None:
    lives = made_child(tmp_path / "log", "sleep", "60", doing="")
    assert lives.state == "waiting"
    changes = [lives.poll(), lives.poll()]
    assert (changes, lives.state) == ([True, False], "starting")
    lives.progress = lambda: "loads"
    changes = [lives.poll(), lives.poll()]
    assert (changes, lives.state, lives.doing) == ([True, False], "starting", "loads")
    lives.is_ready = lambda: True
    changes = [lives.poll(), lives.poll()]
    assert (changes, lives.state, lives.doing) == ([True, False], "serving", "")
    lives.is_ready = lambda: False
    changes = [lives.poll(), lives.poll()]
    assert (changes, lives.state) == ([True, False], "not serving")
    lives.ask_to_end()
    lives.stop()
    assert lives.process is not None
    assert lives.process.returncode == -signal.SIGINT


def test_one_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "STOP_TIMEOUT_S", 0.2)
    code = "import signal, time; signal.signal(2, signal.SIG_IGN); print(1, flush=True)\ntime.sleep(60)"
    deaf = made_child(tmp_path / "log", *PYTHON, "-c", code)
    deaf.poll()
    while "1" not in (tmp_path / "log").read_text():
        time.sleep(0.01)
    deaf.ask_to_end()
    deaf.stop()
    assert deaf.process is not None
    assert deaf.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("serves", [True, False])
def test_only_one_that_serves_has_requests_to_finish(
    serves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "STOP_TIMEOUT_S", 0.1)
    ends = made_child(tmp_path / "log", *PYTHON, "-c", ENDS_LATE, ready=serves)
    ends.drain_s = 10.0
    poll_while(ends, lambda: ends.process is None or "1" not in (tmp_path / "log").read_text())
    ends.poll()
    ends.ask_to_end()
    ends.stop()
    assert ends.process is not None
    assert ends.process.returncode == (7 if serves else -signal.SIGKILL)


ENDS_LATE = """
import os, signal, time
signal.signal(signal.SIGINT, lambda *_: (time.sleep(1), os._exit(7)))
print(1, flush=True)
time.sleep(60)
"""


def test_what_a_dead_child_left_behind_is_removed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    dies = made_child(log, "sh", "-c", "sleep 60 & echo $!")
    poll_until(dies, "starting")
    poll_until(dies, "ended")
    left = int(log.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(left) and psutil.Process(left).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("code", "doing", "given_up_after"),
    [
        ("raise SystemExit(0)", "", 1),
        ("raise SystemExit(1)", "waits for ranks [1]", 3),
        ("import os; os.kill(os.getpid(), 9)", "", 3),
    ],
)
def test_when_a_child_is_given_up(
    code: str, doing: str, given_up_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waited for a peer and gave up has no wrong settings: it is started again."""
    monkeypatch.setattr(child, "FIRST_BACKOFF_S", 0.01)
    waits = f"while ! test -e {tmp_path}/go; do sleep 0.01; done"
    ends = shlex.join([*PYTHON, "-c", code])
    never = made_child(tmp_path / "log", "sh", "-c", f"{waits}; exec {ends}", doing=doing)
    while not never.is_given_up:
        never.poll()
        if never.state == "starting" and never.doing == doing:
            (tmp_path / "go").touch()
        time.sleep(0.005)
    assert never.num_restarts == given_up_after


def test_a_child_that_served_once_is_never_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "FIRST_BACKOFF_S", 0.01)
    served = made_child(tmp_path / "log", "sleep", "0.1", doing="", ready=True)
    poll_until(served, "serving")
    served.is_ready = lambda: False
    served.command = lambda: ["true"]
    while served.num_restarts < 4:
        served.poll()
        time.sleep(0.005)
    assert not served.is_given_up


def test_only_what_this_life_wrote_is_its_failure(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("ValueError: of an earlier start\n")
    silent = made_child(log, "true")
    poll_until(silent, "starting")
    poll_until(silent, "ended")
    assert (silent.failure, silent.tail()) == ("", "")
    silent.command = lambda: ["sh", "-c", "echo KeyError: now; kill -9 $$"]
    poll_until(silent, "starting")
    poll_until(silent, "killed")
    assert silent.failure == "", "killed with -9: what it had written is no reason"
    assert silent.tail() == "KeyError: now\n"
    log.unlink()
    assert silent.tail() == ""


ENGINE = "(EngineCore pid=7) ERROR 11-24 21:45:12 [core.py:1512]"


TRACEBACK = f"""\
{ENGINE} Traceback (most recent call last):\r
{ENGINE}   File "a.py", line 3, in f\r
{ENGINE}     raise E\r
{ENGINE} a.b.JoinTimeoutError: rank 1 is missing\r
Traceback (most recent call last):
  raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above.
nanobind: leaked 64 types!
 - leaked type Error: x
"""


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("", ""),
        ("(APIServer pid=7) INFO 11-24 21:45:12 [a.py:1] ready, 0 errors\n", ""),
        ("WARNING 11-24 21:45:12 [a.py:1] errors like `OSError: [Errno 24]`\n", ""),
        ("usage: vllm [-h]\nvllm: error: no such option\n", "vllm: error: no such option"),
        (TRACEBACK, "a.b.JoinTimeoutError: rank 1 is missing"),
        ("RuntimeError: See root cause above.\n", "RuntimeError: See root cause above."),
        ("\x1b[2m2026\x1b[0m \x1b[31mERROR\x1b[0m router: in use\n", "2026 ERROR router: in use"),
        ("OSError: a\x1b]0;title\x07\x1b[2Jb\rdone\n", "OSError: a]0;titleb"),
        ("thread 'main' panicked at a.rs:3\nnote: run\n", "thread 'main' panicked at a.rs:3"),
        (f"ValueError: {'x' * 900}\n", f"ValueError: {'x' * 288}"),
    ],
)
def test_the_last_error_of_a_log(log: str, error: str) -> None:
    assert child.last_error(log) == error

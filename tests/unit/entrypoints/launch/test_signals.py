"""A launch in a process of its own, and the signals that end it."""

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.unit.entrypoints.launch.fakes import launched

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(sent: signal.Signals, tmp_path: Path) -> None:
    with launched(tmp_path) as (process, family):
        process.send_signal(sent)
        assert process.wait(timeout=20) == 0
        assert not psutil.wait_procs(family, timeout=5)[1]


def test_a_terminal_that_goes_away_takes_everything_with_it(tmp_path: Path) -> None:
    with launched(tmp_path) as (process, family):
        assert process.stdout is not None
        process.stdout.close()  # so that what launch has to say fails
        process.send_signal(signal.SIGHUP)
        process.wait(timeout=20)
        assert not psutil.wait_procs(family, timeout=5)[1]


def test_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    with launched(tmp_path, "nohup") as (process, family):
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert not psutil.wait_procs(family, timeout=5)[1]


def test_launch_killed_with_9_leaves_nothing(tmp_path: Path) -> None:
    with launched(tmp_path) as (process, family):
        process.kill()
        assert not psutil.wait_procs(family, timeout=10)[1]

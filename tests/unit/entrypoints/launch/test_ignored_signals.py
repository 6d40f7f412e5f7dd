"""Signals that a parent ignores, and parents that die: what is started hears both."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.entrypoints.launch.children import made_child
from vllm_dwdp.entrypoints.launch.process import ENDING_SIGNALS, ending_with

pytestmark = pytest.mark.timeout(60)


def test_a_parent_that_died_before_the_kernel_was_asked() -> None:
    ask = ending_with(os.getppid())
    late = subprocess.Popen(["sleep", "60"], preexec_fn=ask)  # noqa: PLW1509
    assert late.wait(timeout=10) == 128 + signal.SIGTERM


def test_a_parent_that_dies_between_fork_and_exec(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = ending_with(os.getpid())

    def ask_and_be_told() -> None:
        ask()
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        told = subprocess.Popen(["sleep", "60"], preexec_fn=ask_and_be_told)  # noqa: PLW1509
        assert told.wait(timeout=10) == -signal.SIGTERM, "our handler swallowed it"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("sent", ENDING_SIGNALS)
def test_a_child_hears_signals_that_its_parent_ignores(
    sent: signal.Signals, tmp_path: Path
) -> None:
    before = signal.signal(sent, signal.SIG_IGN)
    try:
        kept = made_child(tmp_path / "log", "sleep", "60")
        kept.poll()
    finally:
        signal.signal(sent, before)
    assert kept.process is not None
    kept.process.send_signal(sent)
    assert kept.process.wait(timeout=10) == -sent


IGNORANT = """
import signal, subprocess, sys
from tests.helpers.ignored_signals import hear_ignored_signals
from vllm_dwdp.entrypoints.launch.process import ENDING_SIGNALS
for number in ENDING_SIGNALS:
    signal.signal(number, signal.SIG_IGN)
hear_ignored_signals()
for number in ENDING_SIGNALS:
    signal.raise_signal(number)
    started = subprocess.Popen(["sleep", "60"])
    started.send_signal(number)
    assert started.wait(timeout=20) == -number, number
print("outlived them")
"""


def test_what_is_ignored_here_is_heard_by_programs_started_here() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", IGNORANT], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stdout == "outlived them\n", ended.stderr

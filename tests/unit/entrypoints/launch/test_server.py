"""A server of the bench: it ends with its parent, and hears what that ignores."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers.waiting import wait_until
from vllm_dwdp.entrypoints.launch import server

pytestmark = pytest.mark.timeout(60)


def sleeping_program(path: Path) -> str:
    path.write_text("#!/bin/sh\nexec sleep 60\n")
    path.chmod(0o755)
    return str(path)


def test_a_server_hears_signals_that_its_parent_ignores(tmp_path: Path) -> None:
    program = [sleeping_program(tmp_path / "vllm")]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with server.Server(["x"], tmp_path / "log", {}, program) as started:
            assert os.getsid(started.process.pid) == started.process.pid
            assert started.stop(signal.SIGINT) == -signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)


PARENT = """
from pathlib import Path
from vllm_dwdp.entrypoints.launch import server
started = server.Server([], Path("{log}"), {{}}, [{program!r}])
{then}
print(started.process.pid, flush=True)
input()
"""


@pytest.mark.parametrize("then", ["", "started.suspend()"], ids=["running", "suspended"])
def test_a_server_ends_with_its_parent(tmp_path: Path, then: str) -> None:
    program = sleeping_program(tmp_path / "vllm")
    code = PARENT.format(program=program, log=tmp_path / "log", then=then)
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        started = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert not psutil.wait_procs([started], timeout=10)[1]


def test_a_suspended_server_is_resumed_and_killed(tmp_path: Path) -> None:
    program = [sleeping_program(tmp_path / "vllm")]
    with server.Server([], tmp_path / "log", {}, program) as started:
        process = psutil.Process(started.process.pid)
        for _ in range(2):
            started.suspend()
            wait_until(lambda: process.status() == psutil.STATUS_STOPPED, timeout_s=10)
            started.resume()
            wait_until(lambda: process.status() != psutil.STATUS_STOPPED, timeout_s=10)
        started.suspend()
        started.kill()
        assert started.process.returncode == -signal.SIGKILL

"""A killed server leaves nothing behind, also no shared memory by which it asked its workers."""

import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.waiting import wait_until
from vllm_dwdp.entrypoints.launch.process import TRACKER_TIMEOUT_S, kill_group, start_process
from vllm_dwdp.entrypoints.launch.server import Server

pytestmark = pytest.mark.timeout(60)

WITH_A_WORKER = """
import multiprocessing
from multiprocessing.shared_memory import SharedMemory
import time

if __name__ == "__main__":
    queue = SharedMemory(create=True, size=4096)
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=[60])
    worker.start()
    print(queue.name, flush=True)
    worker.join()
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    (tmp_path / "server.py").write_text(WITH_A_WORKER)
    return [sys.executable, str(tmp_path / "server.py")]


def queue_of(log: Path) -> Path:
    wait_until(lambda: log.read_text().endswith("\n"), timeout_s=30)
    queue = Path("/dev/shm", log.read_text().strip())
    assert queue.exists()
    return queue


@pytest.mark.parametrize("is_stopped", [False, True], ids=["running", "stopped"])
def test_a_group_that_is_killed_leaves_no_shared_memory(
    program: list[str], tmp_path: Path, is_stopped: bool
) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        started = start_process(program, output, {})
    queue = queue_of(log)
    family = [psutil.Process(started.pid)]
    family += family[0].children(recursive=True)
    assert len(family) == 3, "a worker and a resource tracker"
    for member in family if is_stopped else ():
        member.suspend()
    begun = time.monotonic()
    kill_group(started.pid)
    assert time.monotonic() - begun < TRACKER_TIMEOUT_S, "it waited in vain"
    assert started.wait(timeout=10) == -signal.SIGKILL
    assert not queue.exists()
    assert not psutil.wait_procs(family, timeout=10)[1]


def test_a_server_that_is_killed_leaves_no_shared_memory(
    program: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with Server([], log, {}, program) as started:
        queue = queue_of(log)
        started.kill()
    assert not queue.exists()

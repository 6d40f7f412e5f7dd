"""vLLM's benchmark as a process that is asked for one run after another."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dwdp.entrypoints.bench.client import BenchClient
from vllm_dwdp.errors import DwdpError


def answering(tmp_path: Path, program: str) -> BenchClient:
    """Return a client whose process is ours: no vLLM is imported."""
    client = BenchClient.__new__(BenchClient)
    client.log = tmp_path / "log"
    client.log.write_text("".join(f"line {number}\n" for number in range(99)))
    client._process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return client


@pytest.fixture
def sleeping_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchClient:
    """Return a client whose process sleeps; started while SIGINT is ignored."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return BenchClient([0], tmp_path / "log")
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_client_hears_signals_that_its_parent_ignores(sleeping_client: BenchClient) -> None:
    with sleeping_client as client:
        os.kill(client.pid, signal.SIGINT)
        assert client._process.wait(timeout=20) == -signal.SIGINT


def test_an_interrupted_benchmark_ends_its_client_at_once(sleeping_client: BenchClient) -> None:
    with pytest.raises(KeyboardInterrupt), sleeping_client:
        raise KeyboardInterrupt
    assert sleeping_client._process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("completed", "answer", "message"),
    [(3, "done", "3 of 4 requests were answered"), (4, "failed X", "failed X"), (4, "done", "")],
)
def test_a_run_with_failed_requests_is_refused(
    tmp_path: Path, completed: int, answer: str, message: str
) -> None:
    """They take no time, so figures of the others would flatter."""
    result = tmp_path / "result.json"
    errors = ["refused"] * (4 - completed) + [""] * completed
    result.write_text(json.dumps({"completed": completed, "errors": errors}))
    with answering(tmp_path, f"print({answer!r})") as client:
        if not message:
            assert client.finish(result)["completed"] == 4
            return
        with pytest.raises(DwdpError, match=message) as caught:
            client.finish(result)
    assert "line 98" in str(caught.value)
    assert "line 50" not in str(caught.value)


@pytest.mark.multiprocess
def test_a_client_whose_run_fails_says_so(tmp_path: Path) -> None:
    """It is vLLM's own benchmark that fails here: nobody listens on that port."""
    cores = sorted(os.sched_getaffinity(0))[:1]
    with BenchClient(cores, tmp_path / "log") as client:
        client.wait_until_ready()
        client.begin(["--no-such-option"])
        with pytest.raises(DwdpError, match="vllm bench serve failed") as caught:
            client.finish(tmp_path / "result.json")
        assert "--no-such-option" in str(caught.value), (
            "the end of its log, which goes with the run"
        )

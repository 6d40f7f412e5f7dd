"""What clients meet at a real launch: ranks behind the real router, an end with running requests."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import Checkpoints
from tests.helpers.waiting import wait_until
from vllm_dwdp.entrypoints.launch.child import STOP_TIMEOUT_S
from vllm_dwdp.entrypoints.launch.ports import free_ports

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

QUESTION = {"model": "m", "prompt": "launch", "temperature": 0, "max_tokens": 4}
START_S = 120
"""Of two ranks that import vLLM side by side, on a machine with other work."""
NUM_LAYERS = 28
"""So many that a stream lasts longer than launch waits for ranks that drain nothing."""


class Launch:
    """A launch of two ranks, with everything that is for clients."""

    def __init__(self, model: str, folder: Path, *arguments: str) -> None:
        port, control_port = free_ports(2)
        self.url, self.control = (f"http://127.0.0.1:{each}" for each in (port, control_port))
        self.log = folder / "launch.log"
        command = [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "launch", model]
        command += ["--port", str(port), "--control-port", str(control_port)]
        command += ["--logs", str(folder / "logs"), "--served-model-name", "m"]
        command += ["--enforce-eager", "--max-model-len", "2048", "--shutdown-timeout", "240"]
        command += arguments
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1", "COLUMNS": "300"}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | settings
            )

    def wait_for_line(self, pattern: str) -> re.Match[str]:
        """Return once launch has printed such a line."""

        def find() -> re.Match[str] | None:
            assert self.process.poll() is None, self.log.read_text()
            return re.search(pattern, self.log.read_text(), re.M)

        wait_until(find, timeout_s=250)
        found = find()
        assert found is not None
        return found

    def wait_until_ready(self) -> None:
        self.wait_for_line("^all 2 ranks serve at")
        self.ranks = self.wait_for_line(r"^ranks will listen at (\S+), (\S+); each").groups()
        self.family = psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def launch(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    model = checkpoints("mixtral", 8, num_hidden_layers=NUM_LAYERS)
    started = Launch(model, tmp_path_factory.mktemp("launch"))
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.process.send_signal(signal.SIGTERM)
        started.process.wait(timeout=300)
    assert not psutil.wait_procs(started.family, timeout=20)[1], "left behind"


def ask(url: str, body: Any = None, method: str = "POST", **headers: str) -> tuple[int, Any]:
    """Status and content of an answer, JSON or text."""
    data = None if method == "GET" else json.dumps(body or {}).encode()
    headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            status, content = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read()
    try:
        return status, json.loads(content)
    except json.JSONDecodeError:
        return status, content.decode()


def test_a_pinned_request_is_refused_whichever_rank_the_router_picks(launch: Launch) -> None:
    url = launch.url + "/v1/completions"
    for rank in ("0", "1"):
        answers = [ask(url, QUESTION, **{"X-data-parallel-rank": rank}) for _ in range(4)]
        assert answers == 4 * [answers[0]]
        status, answer = answers[0]
        assert status == 400
        for number, rank_url in enumerate(launch.ranks):
            assert f"rank {number} at {rank_url}" in answer["error"]["message"]
    assert ask(url, QUESTION)[0] == 200


def test_a_rank_that_is_addressed_itself_is_as_stock(launch: Launch) -> None:
    answers = []
    for url in launch.ranks:
        status, answer = ask(url + "/v1/completions", QUESTION)
        answers.append((status, answer["choices"][0]["text"]))
        pinned = {rank: {"X-data-parallel-rank": rank} for rank in ("0", "1")}
        assert ask(url + "/v1/completions", QUESTION, **pinned["0"])[0] == 200
        status, answer = ask(url + "/v1/completions", QUESTION, **pinned["1"])
        assert (status, answer["error"]["message"]) == (
            400,
            "data_parallel_rank 1 is out of range [0, 1).",
        )
    assert answers[0] == answers[1] == (200, answers[0][1])


@pytest.mark.parametrize("path", ["/pause", "/reset_prefix_cache", "/collective_rpc"])
def test_control_requests_are_refused_through_the_router(launch: Launch, path: str) -> None:
    for _ in range(4):
        status, answer = ask(f"{launch.url}{path}?mode=keep")
        assert status == 400
        assert f"POST {path} is refused here" in answer["error"]["message"]
        assert launch.control in answer["error"]["message"]
    assert paused(launch) == [False, False]


def paused(launch: Launch) -> list[bool]:
    return [ask(url + "/is_paused", method="GET")[1]["is_paused"] for url in launch.ranks]


@pytest.mark.feature("`vllm-dwdp launch`: control requests to every rank")
def test_one_control_request_reaches_every_rank(launch: Launch) -> None:
    done = {"status": 200, "answer": {"status": "paused"}}
    expected = (200, {"status": "paused", "ranks": [done, done]})
    assert ask(launch.control + "/pause?mode=keep") == expected
    assert paused(launch) == [True, True]
    assert ask(launch.control + "/resume")[0] == 200
    assert paused(launch) == [False, False]
    status, answer = ask(launch.control + "/collective_rpc", {"method": "dwdp_status"})
    told = [rank["answer"]["results"][0]["dwdp_rank"] for rank in answer["ranks"]]
    assert (status, told) == (200, [0, 1])
    assert ask(launch.control + "/sleep?level=1")[0] == 200
    assert paused(launch) == [True, True], "on a CPU stock vLLM's sleep is a pause"
    assert ask(launch.control + "/wake_up")[0] == 200
    assert paused(launch) == [False, False]
    status, answer = ask(launch.control + "/collective_rpc", {"method": "not_there"})
    assert status == 500, answer
    assert "ranks [0, 1] of 2 failed" in answer["error"]["message"], answer
    assert [rank["status"] for rank in answer["ranks"]] == [500, 500], answer
    assert ask(launch.ranks[1] + "/pause?mode=keep")[0] == 200
    assert paused(launch) == [False, True], "who addresses one rank reaches that one"
    assert ask(launch.control + "/resume")[0] == 200


class Stream(threading.Thread):
    """Reads a long answer, piece by piece."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.num_pieces = 0
        self.last: dict[str, Any] = {}
        self.end = ""
        self.start()

    def run(self) -> None:
        body = QUESTION | {"stream": True, "max_tokens": 1900, "ignore_eos": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    self.num_pieces += 1
                    self.last = json.loads(line.removeprefix(b"data: "))
                elif line.strip():
                    self.end = line.decode().strip()


@pytest.mark.feature("`vllm-dwdp launch`: draining")
def test_running_streams_finish_and_new_requests_are_refused_meanwhile(launch: Launch) -> None:
    """The last test of this launch."""
    streams = [Stream(launch.url) for _ in range(2)]
    wait_until(lambda: all(stream.num_pieces > 20 for stream in streams), timeout_s=60)
    launch.process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    time.sleep(2)
    for question in (QUESTION, QUESTION | {"prompt": [5, 6, 7]}):
        status, answer = ask(launch.url + "/v1/completions", question)
        assert status == 503, answer
        for url in launch.ranks:
            status, answer = ask(url + "/v1/completions", question)
            assert status == 503, f"stock answers 500, or 200 and no text: {answer}"
    assert ask(launch.url + "/readiness", method="GET")[0] == 503
    for stream in streams:
        stream.join(timeout=300)
    lasted_s = time.monotonic() - told
    print(f"the streams went on for {lasted_s:.0f} s")
    assert lasted_s > STOP_TIMEOUT_S, "the test shows nothing: make the model larger"
    for stream in streams:
        assert (stream.last["choices"][0]["finish_reason"], stream.end) == (
            "length",
            "data: [DONE]",
        )
    assert launch.process.wait(timeout=60) == 0
    assert "stopping: running requests have 240 s to finish" in launch.log.read_text()


def test_a_rank_that_hangs_while_it_starts_is_started_again(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """It is stopped with all its processes, and its peer waits for it.

    As a program: a fork loads its experts before `launch` looks at it.
    """
    started = Launch(
        checkpoints("mixtral", 8), tmp_path, "--start-timeout", f"{START_S}", "--no-fork-ranks"
    )
    try:
        pid = int(started.wait_for_line(r"^rank 1: starting, pid (\d+): loads its experts")[1])
        os.killpg(pid, signal.SIGSTOP)
        hung = rf"^rank {{}}: hung and was ended, .* restarts 1: did not serve within {START_S} s; {{}}"
        started.wait_for_line(hung.format(0, r"waits for ranks \[1\] to publish .*; last wrote: "))
        started.wait_for_line(
            hung.format(1, "says nothing any more, and last: loads its experts; last wrote")
        )
        started.wait_until_ready()
        assert ask(started.url + "/v1/completions", QUESTION)[0] == 200
        assert not psutil.pid_exists(pid)
    finally:
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(timeout=60) == 0

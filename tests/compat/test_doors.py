"""A disaggregated launch with vllm-router and the relay as they are, and small servers as vLLM."""

import json
import os
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.waiting import wait_until
from tests.unit.entrypoints.launch.fakes import interrupt, run, use_fakes
from vllm_dwdp.entrypoints.launch import admission, launcher, pairing
from vllm_dwdp.entrypoints.launch import plan as launch_plan
from vllm_dwdp.entrypoints.launch.disaggregation import Disaggregation
from vllm_dwdp.entrypoints.launch.fronts import ROUTER_READY_PATH
from vllm_dwdp.entrypoints.launch.plan import ROUTER, LaunchPlan, find_program
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.errors import DwdpConfigError

pytestmark = pytest.mark.timeout(120)

SERVER = f"""#!{sys.executable} -IS
import http.server, json, sys
port = int(sys.argv[sys.argv.index("--port") + 1])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        choice = {{"index": 0, "text": str(port), "finish_reason": "stop"}}
        body = json.dumps({{"choices": [choice], "kv_transfer_params": {{"remote_port": port}}}})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, *arguments):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
"""Answers everything, with its port as the text."""


class Deployed:
    """The launch, as a client and its terminal see it."""

    def __init__(self, plan: LaunchPlan, unfit: set[str]) -> None:
        self.plan, self.unfit = plan, unfit
        self.lines: list[str] = []
        assert plan.disaggregation is not None
        self.decodes = [str(port) for port in plan.disaggregation.decode_ports]

    def ask(self) -> str:
        request = urllib.request.Request(
            self.plan.url + "/v1/completions",
            json.dumps({"model": "m", "prompt": "a"}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            return str(json.loads(response.read())["choices"][0]["text"])

    def who_decodes(self) -> set[str]:
        return {self.ask() for _ in range(6)}

    def num_healthy(self) -> int:
        try:
            with urllib.request.urlopen(self.plan.url + ROUTER_READY_PATH, timeout=20) as response:
                return int(json.loads(response.read())["decode"]["healthy"])
        except OSError:
            return 0

    def wait_for_line(self, pattern: str, number: int = 0) -> re.Match[str]:
        def found() -> list[re.Match[str]]:
            return [each for line in [*self.lines] if (each := re.match(pattern, line))][number:]

        wait_until(lambda: bool(found()), timeout_s=30)
        return found()[0]

    def kill(self, name: str, number: int = 0) -> None:
        pid = self.wait_for_line(rf"{name}: serving, pid (\d+)", number)[1]
        os.kill(int(pid), signal.SIGKILL)

    def run(self, folder: Path, steps: Callable[["Deployed"], None]) -> None:
        """Launch, take the steps once all serve, and end."""
        failed: list[BaseException] = []

        def drive() -> None:
            try:
                steps(self)
            except BaseException as error:
                failed.append(error)
            interrupt()

        def react(line: str, lines: list[str]) -> None:
            self.lines = lines
            if line.startswith("all 2 ranks") and driver.ident is None:
                driver.start()

        driver = threading.Thread(target=drive)
        run(self.plan, folder, react)
        driver.join()
        if failed:
            raise failed[0]


@pytest.fixture
def deployed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deployed:
    pytest.importorskip("vllm_router")
    router = find_program(ROUTER)
    made = use_fakes(tmp_path, monkeypatch.setattr)
    (tmp_path / "vllm").write_text(SERVER)
    programs = {"vllm": str(tmp_path / "vllm"), ROUTER: router}
    for module in (launcher, launch_plan):
        monkeypatch.setattr(module, "find_program", programs.__getitem__)
    monkeypatch.setattr(launcher, "check_nixl", lambda: None)
    monkeypatch.setattr(admission, "AGAIN_S", 0.2)
    unfit: set[str] = set()

    def compare(rank: Any, decode: Any, arguments: Any) -> None:
        if any(decode.name.startswith(name) for name in unfit):
            raise DwdpConfigError("--dtype is another one there")

    monkeypatch.setattr(pairing, "check_pair", compare)
    ports = free_ports(6, {made.port, *made.rank_ports})
    both = Disaggregation(
        relay_ports=tuple(ports[:2]),
        decode_ports=tuple(ports[2:4]),
        door_ports=tuple(ports[4:]),
        side_channel_ports=(5600, 5700, 5800),
    )
    return Deployed(replace(made, disaggregation=both), unfit)


def test_a_decode_server_that_is_another_one_is_taken_out_and_back(
    deployed: Deployed, tmp_path: Path
) -> None:
    def steps(launch: Deployed) -> None:
        assert launch.who_decodes() == {*launch.decodes}
        launch.unfit.add("decode 1")
        launch.kill("decode 1")
        launch.wait_for_line("decode 1: gets no requests: --dtype is another one there")
        wait_until(lambda: launch.num_healthy() == 1, timeout_s=20)
        assert launch.who_decodes() == {launch.decodes[0]}
        launch.unfit.clear()
        launch.wait_for_line("decode 1: fits the ranks, and gets requests$")
        wait_until(lambda: launch.num_healthy() == 2, timeout_s=20)
        assert launch.who_decodes() == {*launch.decodes}

    deployed.run(tmp_path, steps)


def test_a_death_that_launch_has_not_noticed_costs_no_request(
    deployed: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launch sleeps meanwhile. Without any decode server the door, or the router, answers 503."""

    def steps(launch: Deployed) -> None:
        assert launch.who_decodes() == {*launch.decodes}
        monkeypatch.setattr(launcher, "POLL_INTERVAL_S", 8.0)
        time.sleep(1.0)
        launch.kill("decode 1")
        assert [launch.ask() for _ in range(8)] == [launch.decodes[0]] * 8
        launch.kill("decode 0")
        with pytest.raises(urllib.error.HTTPError) as refused:
            launch.ask()
        assert refused.value.code == 503, refused.value.read()
        refused.value.close()
        assert not [line for line in launch.lines if "ended with" in line], "it has noticed"

    deployed.run(tmp_path, steps)


def test_clients_read_why_no_decode_server_gets_requests(
    deployed: Deployed, tmp_path: Path
) -> None:
    def steps(launch: Deployed) -> None:
        for name in ("decode 0", "decode 1"):
            launch.unfit.add(name)
            launch.kill(name)
        for name in ("decode 0", "decode 1"):
            launch.wait_for_line(f"{name}: gets no requests")
        wait_until(lambda: launch.num_healthy() == 2, timeout_s=20)
        for _ in range(6):  # longer than the router looks away
            with pytest.raises(urllib.error.HTTPError) as refused:
                launch.ask()
            assert (refused.value.code, refused.value.headers["Retry-After"]) == (503, "5")
            error = json.loads(refused.value.read())["error"]
            assert error["message"] == "--dtype is another one there"
            time.sleep(0.5)

    deployed.run(tmp_path, steps)


def test_doors_open_again_with_a_relay_that_was_killed(deployed: Deployed, tmp_path: Path) -> None:
    def steps(launch: Deployed) -> None:
        launch.kill("relay")
        launch.wait_for_line("relay: serving", 1)
        wait_until(lambda: launch.num_healthy() == 2, timeout_s=20)
        assert launch.who_decodes() == {*launch.decodes}

    deployed.run(tmp_path, steps)

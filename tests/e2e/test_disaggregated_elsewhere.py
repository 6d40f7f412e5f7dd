"""A decode server that launch did not start: behind launch's router, and behind one of our own.

It is a stock server at one port, started again with other settings; it computes the references itself,
as it is asked without a rank.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Checkpoints
from tests.e2e.test_disaggregated import COMMON, GREEDY, ask, choices, metric
from tests.helpers.waiting import wait_until
from vllm_dwdp.entrypoints.launch.disaggregation import CONNECTOR, CONSUMER, SIDE_CHANNEL_PORT_ENV
from vllm_dwdp.entrypoints.launch.fronts import ROUTER_READY_PATH, answers
from vllm_dwdp.entrypoints.launch.plan import ROUTER, find_program
from vllm_dwdp.entrypoints.launch.ports import free_ports, free_ports_in_a_row
from vllm_dwdp.entrypoints.launch.server import Server

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed"),
]

SERVE = ("--served-model-name", "m", "--max-model-len", "2048", *COMMON)
TRANSFER = {
    "kv_connector": CONNECTOR,
    "kv_role": CONSUMER,
    "kv_load_failure_policy": "recompute",
}


class Elsewhere:
    """Stock decode servers, one after the other, at one port."""

    def __init__(self, model: str, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.port, self._channel = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        self._server: Server | None = None
        self._number = 0

    def start(self, *arguments: str) -> None:
        self._number += 1
        words = [self.model, *SERVE, "--no-enable-prefix-caching"]
        words += ["--kv-transfer-config", json.dumps(TRANSFER), *arguments]
        last_core = str(max(os.sched_getaffinity(0)))
        self._server = Server(
            words,
            self.folder / f"elsewhere{self._number}.log",
            {SIDE_CHANNEL_PORT_ENV: str(self._channel), "VLLM_CPU_OMP_THREADS_BIND": last_core},
            port=self.port,
        )
        self._server.wait_until_ready()

    def kill(self) -> None:
        if self._server is not None:
            self._server.kill()

    def fetched(self) -> float:
        return metric(self.url, "vllm:nixl_bytes_transferred_sum")


@pytest.fixture(scope="module")
def elsewhere(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Elsewhere]:
    model = checkpoints("qwen3_moe", 8, num_hidden_layers=4)
    made = Elsewhere(model, tmp_path_factory.mktemp("elsewhere"))
    try:
        made.start()
        yield made
    finally:
        made.kill()


class Launch:
    """A launch without decode servers of its own."""

    def __init__(self, model: str, folder: Path, port: int, *arguments: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "launch.log"
        command = [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "launch", model]
        command += ["--port", str(port), "--logs", str(folder / "logs"), *SERVE]
        command += ["--additional-config", json.dumps({"dwdp": {"mode": "prefetch"}}), *arguments]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "COLUMNS": "300"}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | settings
            )

    def line(self, pattern: str) -> re.Match[str]:
        def find() -> re.Match[str] | None:
            assert self.process.poll() is None, self.log.read_text()
            return re.search(pattern, self.log.read_text(), re.M)

        wait_until(lambda: find() is not None, timeout_s=250)
        found = find()
        assert found
        return found

    def check_expert_bytes(self) -> None:
        urls = self.line(r"^ranks will listen at (\S+), (\S+);").groups()
        assert all(metric(url, "vllm:dwdp_fetched_bytes_total") > 0 for url in urls)


@contextmanager
def launched(model: str, folder: Path, port: int, *arguments: str) -> Iterator[Launch]:
    made = Launch(model, folder, port, *arguments)
    try:
        made.line("^all 2 ranks serve at")
        yield made
    finally:
        made.process.send_signal(signal.SIGTERM)
        made.process.wait(timeout=200)


def check_answers(url: str, elsewhere: Elsewhere, name: str) -> None:
    """Check for the decode server's own answers, and that it fetched each prompt's blocks."""
    for number in range(4):
        before = elsewhere.fetched()
        prompt = f"{name} {number} " * 12
        assert choices(ask(url, **GREEDY, prompt=prompt)) == choices(
            ask(elsewhere.url, **GREEDY, prompt=prompt)
        )
        wait_until(lambda: elsewhere.fetched() > before)  # noqa: B023


@pytest.mark.feature("Disaggregated serving (NIXL): `--decode-url`")
def test_a_decode_url_is_compared_whenever_it_comes_back(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    with launched(elsewhere.model, tmp_path, port, "--decode-url", elsewhere.url) as launch:
        check_answers(launch.url, elsewhere, "first")
        launch.check_expert_bytes()

        elsewhere.kill()
        elsewhere.start("--dtype", "float16")
        differs = "--dtype is 'float16' there and 'bfloat16' here"
        launch.line(f"^decode 0: gets no requests: .* {differs}")
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(launch.url, **GREEDY, prompt="for nobody " * 12)
        said = refused.value.read().decode()
        assert refused.value.code == 503 and refused.value.headers["Retry-After"], said
        assert differs in json.loads(said)["error"]["message"]

        elsewhere.kill()
        elsewhere.start()
        launch.line("^decode 0: fits the ranks, and gets requests")
        check_answers(launch.url, elsewhere, "again")


@contextmanager
def router_of_ones_own(prefill: list[str], decode: str, log: Path) -> Iterator[str]:
    """Yield the URL of a vllm-router that is no child of launch's."""
    port, metrics_port = free_ports(2)
    command = [find_program(ROUTER), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--policy", "round_robin", "--prometheus-port", str(metrics_port)]
    command += ["--vllm-pd-disaggregation", "--kv-connector", "nixl"]
    command += [word for url in prefill for word in ("--prefill", url)] + ["--decode", decode]
    with ExitStack() as end:
        output = end.enter_context(log.open("wb"))
        router = subprocess.Popen(command, stdout=output, stderr=output)
        end.callback(router.wait, timeout=20)
        end.callback(router.kill)
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(url + ROUTER_READY_PATH), timeout_s=60)
        yield url


@pytest.mark.feature("Disaggregated serving (NIXL): `--prefill-only` behind another router")
def test_ranks_alone_behind_a_router_of_ones_own(elsewhere: Elsewhere, tmp_path: Path) -> None:
    """The router is given what `status` lists; the decode server knows nothing of launch."""
    meeting = f"unix://{tmp_path}/meet"
    (tmp_path / "meet").mkdir(mode=0o700)
    dwdp = {"dwdp": {"mode": "prefetch", "rendezvous": meeting}}
    first = free_ports_in_a_row(2)
    given = ("--prefill-only", "--additional-config", json.dumps(dwdp))
    with launched(elsewhere.model, tmp_path, first, *given) as launch:
        status = [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "status", meeting]
        told = subprocess.run([*status, "--json"], capture_output=True, timeout=60, check=True)
        servers = [each for each in json.loads(told.stdout) if "url" in each]
        assert [(each["role"], each["url"], each["state"]) for each in servers] == [
            ("prefill", f"http://127.0.0.1:{first + rank}", "serving") for rank in (0, 1)
        ]
        urls = [each["url"] for each in servers]
        assert [*launch.line(r"^ranks will listen at (\S+), (\S+);").groups()] == urls
        with router_of_ones_own(urls, elsewhere.url, tmp_path / "router.log") as url:
            check_answers(url, elsewhere, "a router")
        launch.check_expert_bytes()

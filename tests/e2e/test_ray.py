"""Ranks that Ray starts as actors, in a cluster of one machine that the test starts."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from vllm.utils.network_utils import get_ip

from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.engine_process import PROMPTS
from tests.helpers.waiting import wait_until
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.process import ending_with
from vllm_dwdp.entrypoints.launch.server import Server

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.feature("Ray data-parallel back end"),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed (the extra `ray`)"
    ),
]

NUM_CPUS = 4
"""Of the cluster: vLLM reserves one for each engine, and one for each worker on the CPU."""


class Cluster:
    """A cluster of this machine, under the address by which vLLM knows it.

    Args:
        address: of its head.
        head: the process that keeps it; all others descend from it.
    """

    def __init__(self, address: str, head: psutil.Process) -> None:
        self.address = address
        self.head = head

    def actors(self) -> list[psutil.Process]:
        """Return the engines that it runs."""
        found = []
        for process in self.head.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "ray::EngineCoreActor" in " ".join(process.cmdline()):
                    found.append(process)
        return found


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (port,) = free_ports(1)
    folder = tempfile.mkdtemp(prefix="dwdp-ray-")  # a short name, for sockets
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--node-ip-address={get_ip()}", f"--port={port}", f"--num-cpus={NUM_CPUS}"]
    command += [f"--temp-dir={folder}", "--object-store-memory=100000000"]
    command += ["--include-dashboard=false", "--disable-usage-stats"]
    # Any: the port above may be one of those that Ray gives to workers.
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    with (tmp_path / "ray.log").open("wb") as log:
        head = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=ending_with(os.getpid()),  # noqa: PLW1509 - it takes no lock
        )
    try:
        wait_until(lambda: "Ray runtime started" in (tmp_path / "ray.log").read_text(), 60)
        yield Cluster(f"{get_ip()}:{port}", psutil.Process(head.pid))
    finally:
        family = psutil.Process(head.pid).children(recursive=True)
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=30)
        for member in psutil.wait_procs(family, timeout=15)[1]:
            member.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_ranks_are_actors(
    stock: StockEngine, checkpoints: Checkpoints, cluster: Cluster, tmp_path: Path
) -> None:
    model = checkpoints("qwen3_moe", 8)
    expected = stock(model)["tokens"]
    arguments = [model, "--served-model-name", "m", "--max-model-len", "512", "--enforce-eager"]
    arguments += ["--max-num-seqs", "1", "--max-num-batched-tokens", "64"]
    arguments += ["--distributed-executor-backend", "dwdp", "--data-parallel-size", "2"]
    arguments += ["--data-parallel-backend", "ray"]
    arguments += ["--additional-config", json.dumps({"dwdp": {"mode": "prefetch"}})]
    with Server(arguments, tmp_path / "log", {"RAY_ADDRESS": cluster.address}) as server:
        server.wait_until_ready()
        assert len(cluster.actors()) == 2 and not server.processes("VLLM::EngineCore")
        for rank in (0, 1):
            found = [server.tokens(prompt, rank=rank, max_tokens=12) for prompt in PROMPTS]
            assert found == expected
        for engine in ("0", "1"):
            wait_until(lambda: server.metric("vllm:dwdp_fetched_bytes_total", engine=engine))  # noqa: B023
            assert server.metric("vllm:dwdp_remote_expert_bytes", engine=engine)
        (victim, _) = cluster.actors()
        victim.kill()
        server.process.wait(timeout=90)  # vLLM ends a server whose engine dies
    wait_until(lambda: not cluster.actors(), 30)

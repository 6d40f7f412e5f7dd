"""Ranks outlive each other: kill -9 under load, adoption of the shard, the launcher.

`DWDP_KILLS=30` runs the long version; the answers must not change and survivors must not notice.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import Checkpoints
from vllm_dwdp.testing.server import Server, ServerError, free_ports

NUM_KILLS = int(os.environ.get("DWDP_KILLS", "2"))
NUM_RANKS = 3
PROMPTS = [f"survive {index} " * (1 + 4 * index) for index in range(4)]
SETTINGS = ("--enforce-eager", "--served-model-name", "m", "--max-model-len", "512")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300 + 120 * NUM_KILLS)]


def start(model: str, rank: int, folder: Path, life: int = 0) -> Server:
    config = json.dumps({"dwdp": {"rendezvous": f"unix://{folder}/meet"}})
    return Server(
        [
            model,
            *SETTINGS,
            *("--distributed-executor-backend", "dwdp", "--additional-config", config),
            *("--data-parallel-size", str(NUM_RANKS), "--data-parallel-rank", str(rank)),
        ],
        folder / f"rank{rank}-{life}.log",
        {},
    )


class Client(threading.Thread):
    """Asks one rank, one request at a time, and notes every failure and every other answer."""

    def __init__(self, server: Server, expected: list[list[int]]) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.expected = expected
        self.num_answers = 0
        self.failures: list[str] = []
        self._stop_event = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stop_event.is_set():
            number = self.num_answers % len(PROMPTS)
            try:
                tokens = self.server.tokens(PROMPTS[number])
            except (OSError, urllib.error.URLError) as error:
                self.failures.append(repr(error))
                return
            if tokens != self.expected[number]:
                self.failures.append(f"{tokens} instead of {self.expected[number]}")
            self.num_answers += 1
            time.sleep(0.1)

    def end(self) -> None:
        self._stop_event.set()
        self.join(timeout=120)


def footprint(server: Server) -> tuple[int, int]:
    """Open files and shared mappings of the rank's worker."""
    (worker,) = server.processes("Worker")
    maps = Path(f"/proc/{worker.pid}/maps").read_text()
    return worker.num_fds(), maps.count("memfd:dwdp")


def test_kills_under_load(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model, dice = checkpoints("mixtral", 8), random.Random(5)
    servers = [start(model, rank, tmp_path) for rank in range(NUM_RANKS)]
    clients: dict[int, Client] = {}
    try:
        for server in servers:
            server.wait_until_ready()
        assert len(list((tmp_path / "meet").glob("g0-r*.sock"))) == NUM_RANKS
        assert (tmp_path / "meet").stat().st_mode & 0o777 == 0o700
        expected = [servers[0].tokens(prompt) for prompt in PROMPTS]
        clients = {rank: Client(server, expected) for rank, server in enumerate(servers)}
        time.sleep(2)
        before = [footprint(server) for server in servers]
        servers[2].suspend()
        for server in servers[:2]:
            started = time.monotonic()
            assert [server.tokens(prompt) for prompt in PROMPTS] == expected
            assert time.monotonic() - started < 20, "a stopped rank holds the others up"
        servers[2].resume()
        for life in range(1, NUM_KILLS + 1):
            victim = dice.randrange(NUM_RANKS)
            time.sleep(dice.uniform(0, 2))
            servers[victim].kill()
            clients[victim].end()
            servers[victim] = start(model, victim, tmp_path, life)
            servers[victim].wait_until_ready()
            log = servers[victim].log.read_text()
            assert f"DWDP rank {victim} adopted" in log, "it read its experts from disk again"
            clients[victim] = Client(servers[victim], expected)
            for rank, client in clients.items():
                if rank != victim:
                    assert not client.failures, f"rank {rank} noticed the death of {victim}"
        time.sleep(3)
        for client in clients.values():
            client.end()
            assert not client.failures
            assert client.num_answers > 3
        for rank, server in enumerate(servers):
            num_files, num_mappings = footprint(server)
            assert num_mappings == before[rank][1]
            assert num_files <= before[rank][0] + 4
        assert proportional_experts(servers) <= 1.2 * expert_bytes(servers[0])

        # One that returns with another checkpoint is refused, and the survivors go on.
        servers[0].kill()
        servers[0] = start(changed_copy(model, tmp_path), 0, tmp_path, NUM_KILLS + 1)
        with pytest.raises(ServerError):
            servers[0].wait_until_ready()
        assert "checkpoint_digest is" in servers[0].log.read_text()
        for server in servers[1:]:
            assert [server.tokens(prompt) for prompt in PROMPTS] == expected
    finally:
        for client in clients.values():
            client._stop_event.set()
        for server in servers:
            server.stop()
    assert not list((tmp_path / "meet").iterdir())


def proportional_experts(servers: list[Server]) -> int:
    """Bytes of shared expert memory over all workers, each page once."""
    total = 0
    for server in servers:
        (worker,) = server.processes("Worker")
        total += sum(
            mapping.pss for mapping in worker.memory_maps() if "memfd:dwdp" in mapping.path
        )
    return total


def expert_bytes(server: Server) -> float:
    time.sleep(2)
    held = server.metric("vllm:dwdp_resident_expert_bytes")
    remote = server.metric("vllm:dwdp_remote_expert_bytes")
    assert held and remote
    return held + remote


def changed_copy(model: str, folder: Path) -> str:
    """The checkpoint with one byte flipped."""
    changed = folder / "changed"
    shutil.copytree(model, changed)
    (weights,) = changed.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-100_000] ^= 1
    weights.write_bytes(content)
    return str(changed)


def test_launch_restarts_a_killed_rank_behind_the_router(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    pytest.importorskip("vllm_router")
    (port,) = free_ports(1)
    log = tmp_path / "launch.log"
    command = [sys.executable, "-m", "vllm_dwdp.entrypoints.cli", "launch"]
    command += [checkpoints("mixtral", 8), "--ranks", "2", "--port", str(port)]
    command += ["--logs", str(tmp_path / "logs"), *SETTINGS]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "COLUMNS": "200"},
        )
    try:
        wait_for(log, process, "all 2 ranks serve at", 200)
        router = Server.__new__(Server)
        router.url = f"http://127.0.0.1:{port}"
        expected = router.tokens(PROMPTS[2])
        family = psutil.Process(process.pid).children(recursive=True)
        victim = next(child for child in family if "Worker" in " ".join(child.cmdline()))
        victim.kill()
        wait_for(log, process, "restarts 1", 60)
        for _ in range(5):
            assert router.tokens(PROMPTS[2]) == expected, "the survivor answers meanwhile"
        wait_for(log, process, "serving, pid", 200, after="starts again in")
        for _ in range(5):
            assert router.tokens(PROMPTS[2]) == expected
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=90)
    assert process.returncode == 0
    assert not psutil.wait_procs(family, timeout=10)[1]


def wait_for(
    log: Path, process: subprocess.Popen[bytes], text: str, timeout_s: float, after: str = ""
) -> None:
    deadline = time.monotonic() + timeout_s
    while (
        text not in log.read_text().rpartition(after)[2] if after else text not in log.read_text()
    ):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)

"""Ranks outlive each other: kill -9 under load, adoption of the shard, the launcher.

`DWDP_KILLS=30` runs the long version (`DWDP_SEED` makes other kills of it), `DWDP_STOP_S=60` stops a
rank for longer; the answers must not change and survivors must not notice.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import Checkpoints
from vllm_dwdp.entrypoints.cli.status import find_ranks
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.server import Server, ServerError

NUM_KILLS = int(os.environ.get("DWDP_KILLS", "1"))
SEED = int(os.environ.get("DWDP_SEED", "5"))
STOP_S = float(os.environ.get("DWDP_STOP_S", "3"))
NUM_RANKS = 3
PROMPTS = [f"survive {index} " * (1 + 4 * index) for index in range(4)]
SETTINGS = ("--enforce-eager", "--served-model-name", "m", "--max-model-len", "512")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300 + 120 * NUM_KILLS + 2 * STOP_S)]


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


def footprint(server: Server) -> tuple[int, int, int]:
    """Open files, shared mappings and anonymous bytes of the rank."""
    (rank,) = server.ranks()
    maps = Path(f"/proc/{rank.pid}/maps").read_text()
    rollup = Path(f"/proc/{rank.pid}/smaps_rollup").read_text()
    anonymous = int(rollup.split("Anonymous:")[1].split()[0]) * 1024
    return rank.num_fds(), maps.count("memfd:dwdp"), anonymous


class Deployment:
    """Ranks that all answer under load, what they answered first, and what each held then.

    All but the last are started at once.
    """

    def __init__(self, model: str, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.servers = [start(model, rank, folder) for rank in range(NUM_RANKS - 1)]
        self.clients: dict[int, Client] = {}
        self.before: dict[int, tuple[int, int, int]] = {}
        self.back_after_s: list[float] = []
        self.num_answers = 0
        self.never_killed = set(range(NUM_RANKS))

    def start_the_last(self) -> None:
        if len(self.servers) < NUM_RANKS:
            self.servers.append(start(self.model, NUM_RANKS - 1, self.folder))

    def wait_until_serving(self) -> None:
        self.start_the_last()
        for server in self.servers:
            server.wait_until_ready()
        self.expected = [self.servers[0].tokens(prompt) for prompt in PROMPTS]
        for rank in range(NUM_RANKS):
            self.load(rank)

    def load(self, rank: int) -> None:
        """Put a rank under load, once it has taken the memory that it needs."""
        assert [self.servers[rank].tokens(prompt) for prompt in PROMPTS] == self.expected
        self.before[rank] = footprint(self.servers[rank])
        self.clients[rank] = Client(self.servers[rank], self.expected)

    def stop_one(self, rank: int) -> None:
        """SIGSTOP for a while: the others answer in time, and it goes on where it was."""
        self.servers[rank].suspend()
        stopped = time.monotonic()
        while time.monotonic() - stopped < STOP_S:
            for other, server in enumerate(self.servers):
                if other != rank:
                    started = time.monotonic()
                    assert [server.tokens(prompt) for prompt in PROMPTS] == self.expected
                    assert time.monotonic() - started < 20, "a stopped rank holds the others up"
        self.servers[rank].resume()
        assert self.servers[rank].tokens(PROMPTS[0]) == self.expected[0]

    def kill_one(self, rank: int, life: int) -> None:
        """SIGKILL, and its return: it adopts its experts, and the others notice nothing."""
        self.servers[rank].kill()
        killed = time.monotonic()
        self.never_killed.discard(rank)
        self.clients[rank].end()
        self.num_answers += self.clients[rank].num_answers
        self.servers[rank] = start(self.model, rank, self.folder, life)
        self.servers[rank].wait_until_ready()
        self.back_after_s.append(time.monotonic() - killed)
        log = self.servers[rank].log.read_text()
        assert f"DWDP rank {rank} adopted" in log, "it read its experts from disk again"
        self.load(rank)
        for other, client in self.clients.items():
            if other != rank:
                assert not client.failures, f"rank {other} noticed the death of {rank}"

    def end_load(self) -> None:
        for client in self.clients.values():
            client.end()
            assert not client.failures
            assert client.num_answers > 3
            self.num_answers += client.num_answers
        back = sorted(self.back_after_s)
        print(
            f"{NUM_KILLS} kills (seed {SEED}): {self.num_answers} requests answered, none failed; "
            f"back after {back[len(back) // 2]:.0f} s (median), {back[-1]:.0f} s (longest)"
        )

    def must_not_have_grown(self) -> None:
        for rank, server in enumerate(self.servers):
            grown = [
                now - then for now, then in zip(footprint(server), self.before[rank], strict=True)
            ]
            print(
                f"rank {rank} ({'never killed' if rank in self.never_killed else 'restarted'}): "
                f"{grown[0]:+d} files, {grown[1]:+d} mappings, {grown[2] / 2**20:+.1f} MiB anonymous"
            )
            assert grown[0] <= 4 and grown[1] == 0 and grown[2] < 32 * 2**20
        assert proportional_experts(self.servers) <= 1.2 * expert_bytes(self.servers[0])

    def close(self) -> None:
        for client in self.clients.values():
            client._stop_event.set()
        for server in self.servers:
            server.stop()


@pytest.fixture(scope="module")
def ranks(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("survival")
    made = Deployment(checkpoints("mixtral", 8), folder)
    try:
        yield made
    finally:
        made.close()


def test_a_rank_that_waits_opens_no_port_and_says_for_whom(ranks: Deployment) -> None:
    """Once the missing rank has come, the first `/health` that is 200 is true at once."""
    waits = r"waits for ranks \[2\] to publish their experts \(\d+ s of 600 s\)"
    for rank, server in enumerate(ranks.servers):
        wait_for_line(server, rf"DWDP rank {rank} of group 0 {waits}")
        first = wait_for_line(server, r" waits for ranks \[[12, ]+\] to publish .*\((\d+) s of")
        assert 10 <= int(first[1]) < 15, "it says so every ten seconds"
        assert ask_health(server) == REFUSED
    statuses = find_ranks(
        f"unix://{ranks.folder}/meet", secret_file=None, group_size=1, num_groups=1
    )
    for status in statuses:
        assert (status["state"], status["peers"]["2"]) == ("starting", "missing")
        assert re.fullmatch(waits, status["doing"])
    assert len(statuses) == 2

    ranks.start_the_last()
    waiting = set(ranks.servers)
    while waiting:
        for server in list(waiting):
            assert server.process.poll() is None, server.tail()
            if (heard := ask_health(server)) != REFUSED:
                assert heard == 200
                assert len(server.tokens(PROMPTS[0])) == 16, "the first request"
                waiting.remove(server)
        time.sleep(0.1)


REFUSED = 0


def ask_health(server: Server) -> int:
    """Return the status of `GET /health`, or `REFUSED`."""
    try:
        server.get("/health")
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ConnectionRefusedError):
            raise
        return REFUSED
    return 200


def wait_for_line(server: Server, pattern: str) -> re.Match[str]:
    deadline = time.monotonic() + 250
    while not (found := re.search(pattern, server.log.read_text())):
        assert server.process.poll() is None, server.tail()
        assert time.monotonic() < deadline, server.tail()
        time.sleep(0.2)
    return found


@pytest.mark.feature(
    "External load balancing (`--data-parallel-rank`): ranks are killed and return"
)
def test_kills_under_load(ranks: Deployment) -> None:
    dice = random.Random(SEED)
    ranks.wait_until_serving()
    assert len(list((ranks.folder / "meet").glob("g0-r*.sock"))) == NUM_RANKS
    assert (ranks.folder / "meet").stat().st_mode & 0o777 == 0o700
    ranks.stop_one(2)
    began = time.time()
    for life in range(1, NUM_KILLS + 1):
        time.sleep(dice.uniform(0, 2))
        ranks.kill_one(dice.randrange(NUM_RANKS), life)
    time.sleep(3)
    ranks.end_load()
    ranks.must_not_have_grown()
    for rank in ranks.never_killed:
        generation = ranks.servers[rank].metric("vllm:dwdp_generation_seconds")
        failed_at = ranks.servers[rank].metric("vllm:dwdp_last_failure_seconds")
        assert generation is not None and 0 < generation < began
        assert failed_at is not None and failed_at > began, "a death is a failure"

    # One that returns with another checkpoint is refused, and the survivors go on.
    ranks.servers[0].kill()
    changed = changed_copy(ranks.model, ranks.folder)
    ranks.servers[0] = start(changed, 0, ranks.folder, NUM_KILLS + 1)
    with pytest.raises(ServerError):
        ranks.servers[0].wait_until_ready()
    assert "checkpoint_digest is" in ranks.servers[0].log.read_text()
    for server in ranks.servers[1:]:
        assert [server.tokens(prompt) for prompt in PROMPTS] == ranks.expected
    ranks.close()
    assert not list((ranks.folder / "meet").iterdir())


def proportional_experts(servers: list[Server]) -> int:
    """Bytes of shared expert memory over all ranks, each page once."""
    total = 0
    for server in servers:
        (rank,) = server.ranks()
        total += sum(mapping.pss for mapping in rank.memory_maps() if "memfd:dwdp" in mapping.path)
    return total


def expert_bytes(server: Server) -> float:
    time.sleep(2)
    held = server.metric("vllm:dwdp_resident_expert_bytes")
    remote = server.metric("vllm:dwdp_remote_expert_bytes")
    assert held and remote
    return held + remote


def changed_copy(model: str, folder: Path) -> str:
    """Return the checkpoint with one byte flipped."""
    changed = folder / "changed"
    shutil.copytree(model, changed)
    (weights,) = changed.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-100_000] ^= 1
    weights.write_bytes(content)
    return str(changed)


@pytest.mark.feature("`vllm-dwdp launch` behind vllm-router")
def test_launch_restarts_a_killed_rank_behind_the_router(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    pytest.importorskip("vllm_router")
    (port,) = free_ports(1)
    log = tmp_path / "launch.log"
    command = [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "launch"]
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
        starting = r"rank 1: starting, pid \d+: (loads|waits for|maps|binds|has) "
        assert re.search(starting, log.read_text()), "it says what a starting rank does"
        router = Server.__new__(Server)
        router.url = f"http://127.0.0.1:{port}"
        expected = router.tokens(PROMPTS[2])
        for _ in range(2):  # whichever rank the router picks
            with pytest.raises(urllib.error.HTTPError, match="400"):
                router.tokens(PROMPTS[2], rank=0)
        family = psutil.Process(process.pid).children(recursive=True)
        victim = next(child for child in family if "EngineCore" in " ".join(child.cmdline()))
        victim.kill()
        wait_for(log, process, "restarts 1", 60)
        for _ in range(5):
            assert router.tokens(PROMPTS[2]) == expected, "the survivor answers meanwhile"
        wait_for(log, process, "all 2 ranks serve at", 200, after="starts again in")
        for _ in range(5):
            assert router.tokens(PROMPTS[2]) == expected
        told = log.read_text()
        family = psutil.Process(process.pid).children(recursive=True)
        for child in family:
            if "EngineCore" in " ".join(child.cmdline()):
                child.kill()
        wait_for(log, process, "all 2 ranks serve at", 200, after=told)
        assert router.tokens(PROMPTS[2]) == expected
        must_have_come_back_without_loading(tmp_path / "logs", process, log.read_text())
        family += psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=90)
    assert process.returncode == 0
    assert not psutil.wait_procs(family, timeout=10)[1]


def must_have_come_back_without_loading(
    logs: Path, process: subprocess.Popen[bytes], said: str
) -> None:
    """One rank alone, then both at once: their memory was held, once, and forked ranks mapped it."""
    written = "".join(log.read_text() for log in logs.glob("rank*.log"))
    assert re.findall(r"DWDP rank (\d) loaded ", written) in (["0", "1"], ["1", "0"])
    assert len(re.findall(r"DWDP rank \d adopted ", written)) == 3
    place = re.search(r"ranks meet at (\S+);", said)
    assert place and "holder of group 0: keeps " in said
    holder = find_ranks(place[1], secret_file=None, group_size=1, num_groups=1)[0]
    assert holder["held_ranks"] == [0, 1]
    assert holder["held_bytes"] == holder["shared_bytes"] > 0
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    maps = [each for one in family for each in one.memory_maps() if "memfd:dwdp" in each.path]
    assert 0.9 * holder["held_bytes"] < sum(each.pss for each in maps) <= holder["held_bytes"]


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

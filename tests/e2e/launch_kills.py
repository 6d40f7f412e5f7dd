"""`vllm-dwdp launch` under load while its ranks are killed at random moments, at times all at once.

    python -m tests.e2e.launch_kills CHECKPOINT FOLDER [--kills 100] [--seed 5] [--ranks 2] [--json FILE]

Every rank has a client of its own, which asks it without a break. An answer counts as failed on a
survivor if its rank was not the one that had been killed. A victim is a whole server, its engine or its
front end; three kills in ten come while the last victim is still coming back; every tenth is one of all
ranks at once. Back-off is shortened: it is meant for ranks that die by themselves.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.test_survival import PROMPTS, SETTINGS
from vllm_dwdp.entrypoints.cli.status import find_ranks
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.server import READY_PATH, Server

BACK_TIMEOUT_S = 240.0
START = """
import sys
from vllm_dwdp.entrypoints.launch import child
child.FIRST_BACKOFF_S = child.LONGEST_BACKOFF_S = 0.1
from vllm_dwdp.entrypoints.cli.main import main
sys.argv = ["vllm-dwdp", *sys.argv[1:]]
main()
"""


class RankClient(threading.Thread):
    """Asks one rank, one request at a time; notes failures, and when the rank was to blame for none."""

    def __init__(self, port: int, expected: list[list[int]]) -> None:
        super().__init__(daemon=True)
        self.server = server_at(port)
        self.expected = expected
        self.num_answers = self.num_different = 0
        self.failures: list[str] = []
        self.is_down = False
        """Set by whoever kills the rank, before; it is up again once it has answered `is_up`."""
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        """Ask until `ended`; failures of a rank that is down are its death, not a failure."""
        number = 0
        while not self.ended.is_set():
            number += 1
            was_down = self.is_down
            try:
                tokens = self.server.tokens(PROMPTS[number % len(PROMPTS)])
            except (OSError, ValueError, KeyError) as error:
                if not (was_down or self.is_down):
                    self.failures.append(repr(error))
                time.sleep(0.05)
                continue
            self.num_answers += 1
            self.num_different += tokens != self.expected[number % len(PROMPTS)]

    def is_up(self) -> bool:
        """Whether the rank answers."""
        with suppress(OSError):
            self.server.get(READY_PATH)
            return True
        return False


def server_at(port: int) -> Server:
    """Return the face of a server that somebody else started."""
    server = Server.__new__(Server)
    server.url = f"http://127.0.0.1:{port}"
    return server


class Launch:
    """A running `vllm-dwdp launch`."""

    def __init__(self, model: str, folder: Path, num_ranks: int, *arguments: str) -> None:
        self.logs, self.log = folder / "logs", folder / "launch.log"
        (self.port,) = free_ports(1)
        command = [sys.executable, "-c", START, "launch", model, "--ranks", str(num_ranks)]
        command += ["--port", str(self.port), "--logs", str(self.logs), *SETTINGS, *arguments]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "COLUMNS": "200"},
            )

    def wait_for(self, text: str, timeout_s: float = BACK_TIMEOUT_S) -> None:
        """Return once launch has said it."""
        deadline = time.monotonic() + timeout_s
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    @property
    def place(self) -> str:
        """Where its ranks meet."""
        found = re.search(r"ranks meet at (\S+);", self.log.read_text())
        assert found
        return found[1]

    def fronts(self) -> dict[int, psutil.Process]:
        """Return the front end of every rank that is there."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess):
                words = " ".join(child.cmdline())
                if rank := re.search(r"serve .*--data-parallel-rank (\d+)", words):
                    found[int(rank[1])] = child
        return found

    def rank_ports(self) -> dict[int, int]:
        """Return the port of every rank."""
        return {
            rank: int(" ".join(front.cmdline()).split(" --port ")[1].split()[0])
            for rank, front in self.fronts().items()
        }

    def kill(self, rank: int, what: str) -> bool:
        """SIGKILL for the engine, front end or all of a rank; whether there was such a process."""
        front = self.fronts().get(rank)
        if front is None:
            return False
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if what == "server":
                os.killpg(front.pid, signal.SIGKILL)
                return True
            if what == "front end":
                front.kill()
                return True
            engines = [one for one in front.children() if "EngineCore" in " ".join(one.cmdline())]
            for engine in engines:
                engine.kill()
            return bool(engines)
        return False

    def experts_pss(self) -> int:
        """Bytes of expert memory in the whole family, each page once."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        maps = [each for one in [psutil.Process(self.process.pid), *family] for each in _maps(one)]
        return sum(each.pss for each in maps if "memfd:dwdp" in each.path)

    def lines(self, pattern: str) -> int:
        """How often the ranks' logs say it."""
        return sum(len(re.findall(pattern, log.read_text())) for log in self.logs.glob("rank*.log"))

    def end(self) -> None:
        """End it, and see that nothing of it is left."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        try:
            assert self.process.wait(timeout=90) == 0, self.log.read_text()
        finally:
            self.process.kill()
            alive = psutil.wait_procs(family, timeout=20)[1]
            for one in alive:
                one.kill()
        assert not alive, alive


def _maps(process: psutil.Process) -> list[Any]:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return list(process.memory_maps())
    return []


@dataclasses.dataclass(kw_only=True)
class Kills:
    """What came of them."""

    num_kills: int = 0
    num_all_at_once: int = 0
    num_while_returning: int = 0
    num_answers: int = 0
    num_different: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    back_after_s: list[float] = dataclasses.field(default_factory=list)
    all_back_after_s: list[float] = dataclasses.field(default_factory=list)
    num_loaded: int = 0
    num_adopted: int = 0
    experts_bytes: int = 0
    experts_pss: int = 0


class Campaign:
    """The kills of one launch."""

    def __init__(self, launch: Launch, num_ranks: int, seed: int) -> None:
        launch.wait_for(f"all {num_ranks} ranks serve at")
        ports = launch.rank_ports()
        expected = [server_at(ports[0]).tokens(prompt) for prompt in PROMPTS]
        self._launch = launch
        self._dice = random.Random(seed)
        self._clients = {rank: RankClient(port, expected) for rank, port in ports.items()}
        self._down_since: dict[int, float] = {}
        self.result = Kills()

    def run(self, num_kills: int) -> Kills:
        """Kill, and sum up once all ranks serve again."""
        while self.result.num_kills < num_kills:
            time.sleep(self._dice.uniform(0, 2))
            with suppress(OSError, ValueError, KeyError):
                self._look()
            if self.result.num_kills % 10 == 9 and not self._down_since:
                self._kill(
                    sorted(self._clients), what="engine" if self._dice.random() < 0.5 else "server"
                )
                self._wait(self.result.all_back_after_s)
            elif self._down_since:
                self._kill_again()
            else:
                what = self._dice.choice(["engine", "front end", "server"])
                self._kill([self._dice.choice(sorted(self._clients))], what)
            if self._dice.random() > 0.3 or self.result.num_kills % 10 == 9:
                self._wait(self.result.back_after_s)
        self._wait(self.result.back_after_s)
        time.sleep(2)
        return self._sum_up()

    def _kill(self, ranks: list[int], what: str) -> None:
        for rank in ranks:
            self._clients[rank].is_down = True
            self._down_since[rank] = time.monotonic()
        killed = [self._launch.kill(rank, what) for rank in ranks]
        self.result.num_kills += all(killed)
        self.result.num_all_at_once += all(killed) and len(ranks) == len(self._clients)

    def _kill_again(self) -> None:
        (rank,) = list(self._down_since)[:1]
        killed = self._launch.kill(rank, self._dice.choice(["engine", "server"]))
        self.result.num_kills += killed
        self.result.num_while_returning += killed

    def _look(self) -> None:
        """Ranks that are up again are asked for answers again."""
        for rank in list(self._down_since):
            client = self._clients[rank]
            if client.is_up() and client.server.tokens(PROMPTS[0]) == client.expected[0]:
                client.is_down = False
                del self._down_since[rank]

    def _wait(self, back_after_s: list[float]) -> None:
        if not self._down_since:
            return
        since = max(self._down_since.values())
        time.sleep(0.3)  # a front end still answers a moment after its engine has died
        while self._down_since:
            assert time.monotonic() - since < BACK_TIMEOUT_S, self._launch.log.read_text()
            with suppress(OSError, ValueError, KeyError):
                self._look()
            time.sleep(0.05)
        back_after_s.append(time.monotonic() - since)

    def _sum_up(self) -> Kills:
        result = self.result
        found = find_ranks(self._launch.place, secret_file=None, group_size=1, num_groups=1)
        result.experts_bytes = found[0]["held_bytes"]
        result.experts_pss = self._launch.experts_pss()
        for client in self._clients.values():
            client.ended.set()
            client.join()
            result.num_answers += client.num_answers
            result.num_different += client.num_different
            result.failures += client.failures
        result.num_loaded = self._launch.lines(r"DWDP rank \d+ loaded ")
        result.num_adopted = self._launch.lines(r"DWDP rank \d+ adopted ")
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    launch = Launch(options.model, options.folder, options.ranks)
    try:
        result = Campaign(launch, options.ranks, options.seed).run(options.kills)
    finally:
        launch.end()
    print(json.dumps(dataclasses.asdict(result), indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(dataclasses.asdict(result), indent=1))


if __name__ == "__main__":
    main()

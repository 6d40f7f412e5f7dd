"""Ranks that are killed at named points of their lives, each a fork of one process with vLLM loaded.

Forked by `test_kill_points.py` with a checkpoint and a file for the results, it forks every life. With
a number of kills and a seed, three ranks are killed at random moments instead. `test_formats.py` lets
one rank of two return once for each of several checkpoints.

    python -m tests.e2e.rank_lives CHECKPOINT RESULTS.json [KILLS SEED]
    python -m tests.e2e.rank_lives returns RESULTS.json CHECKPOINT ...
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.e2e import engine_process
from tests.e2e.engine_process import PROMPTS, close_engine, find, footprint, generate, make_engine
from tests.helpers.files import num_open_files
from vllm_dwdp.distributed.status import query_status
from vllm_dwdp.entrypoints.launch.ports import free_ports

JOINING = "vllm_dwdp.model_executor.joining"
JOIN_TIMEOUT_S = 8.0
"""Of the ranks that can only give up: more than two starts differ, on a busy machine too."""
LIFE_TIMEOUT_S = 90.0

BEFORE_SERVING = {
    "hello": "vllm_dwdp.distributed.membership:Membership.meet",
    "mapping": "vllm_dwdp.model_executor.peers:PeerShards._map",
    "completing": "vllm_dwdp.distributed.membership:Membership.announce_ready",
}
"""Rank 0 is killed here, and rank 1 can only give up by its deadline."""

WHILE_SERVING = {
    "first prefetch": ("vllm_dwdp.prefetch.ring:Ring.begin_forward", 0),
    "hand-over": (f"{JOINING}:meet_peers", 0),
    "binding": (f"{JOINING}:bind_views", 0),
    "steady state": ("vllm_dwdp.executor.cpu_worker:DwdpCPUWorker.execute_model", 7),
    "shutdown": ("vllm_dwdp.model_executor.group:ExpertGroup.close", 0),
}
"""Rank 0 is killed at this call of this, in one life after the other, while rank 1 serves."""


@dataclass
class Life:
    """A forked rank."""

    name: str
    pid: int
    output: Path

    def end(self) -> dict[str, Any]:
        """Wait for its end; its result, and `code`, negative for a signal."""
        deadline = time.monotonic() + LIFE_TIMEOUT_S
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"{self.name} did not end within {LIFE_TIMEOUT_S:.0f} s")
            time.sleep(0.05)
        content = json.loads(self.output.read_text()) if self.output.exists() else {}
        return content | {"name": self.name, "code": os.waitstatus_to_exitcode(status)}


class Stage:
    """Where lives are started; every one of a group meets at the same `port`."""

    def __init__(self, model: str, folder: Path, num_ranks: int = 2) -> None:
        self.model = model
        self.folder = folder
        self.num_ranks = num_ranks
        self._number = 0

    def start(
        self,
        name: str,
        rank: int,
        port: int,
        work: Callable[[dict[str, Any]], dict[str, Any]],
        kill_at: str = "",
        kill_after: int = 0,
        join_timeout_s: float = LIFE_TIMEOUT_S,
    ) -> Life:
        """Fork a life that does `work` and is killed at call `kill_after` of `kill_at`, if given."""
        self._number += 1
        output = self.folder / f"{self._number}.json"
        pid = os.fork()
        if pid:
            return Life(name, pid, output)
        try:
            case = {"name": name, "model": self.model, "num_ranks": self.num_ranks, "port": port}
            case["dwdp"] = {"mode": "prefetch", "join_timeout_s": join_timeout_s}
            os.environ |= {"VLLM_DP_SIZE": str(self.num_ranks), "VLLM_DP_MASTER_PORT": str(port)}
            os.environ |= {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)}
            result: dict[str, Any] = {}
            before = footprint()
            try:
                with killed(kill_at, kill_after):
                    result = work(case)
            except BaseException as error:
                result = {"error": f"{type(error).__name__}: {error}"}
            import gc

            gc.collect()
            result["left"] = {key: value - before[key] for key, value in footprint().items()}
            output.write_text(json.dumps(result))
        finally:
            os._exit(0)


@contextmanager
def killed(place: str, after: int) -> Iterator[None]:
    """While active, this process is killed at the call after `after` calls of `place`."""
    if not place:
        yield
        return
    owner, name = find(place)
    stock, num_calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls > after:
            time.sleep(0.5)  # the others see how far we came before we die
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(*args, **kwargs)

    setattr(owner, name, counted)
    yield


def serve_once(case: dict[str, Any]) -> dict[str, Any]:
    """Start, answer every prompt, end."""
    engine = make_engine(case)
    tokens = [generate(engine, index, text) for index, text in enumerate(PROMPTS)]
    status = engine.model_executor.driver_worker.worker.dwdp_status()
    close_engine(engine)
    return {"tokens": tokens, "status": status}


def serve_until(done: Path, serving: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Start, answer the prompts over and over until `done` exists; what changed meanwhile.

    `serving` tells what was answered first, and how often that was since and how often not.
    """
    engine = make_engine(case)
    worker = engine.model_executor.driver_worker.worker
    expected = [generate(engine, index, text) for index, text in enumerate(PROMPTS)]
    tell(serving, tokens=expected, num_rounds=0, num_different=0)
    before, num_rounds, num_different, longest_s = resources(), 0, 0, 0.0
    states = set()
    while not done.exists():
        started = time.monotonic()
        tokens = [generate(engine, index, text) for index, text in enumerate(PROMPTS)]
        longest_s = max(longest_s, time.monotonic() - started)
        num_different += tokens != expected
        num_rounds += 1
        states |= set(worker.dwdp_status()["peers"].values())
        tell(serving, tokens=expected, num_rounds=num_rounds, num_different=num_different)
    result = {
        "tokens": expected,
        "num_rounds": num_rounds,
        "num_different": num_different,
        "longest_s": longest_s,
        "states": sorted(states),
        "grown": {key: value - before[key] for key, value in resources().items()},
        "last_failure": query_status(
            worker.expert_group.seat.launch.endpoint, 0, int(os.environ["VLLM_DP_RANK"]), 5.0
        )["last_failure"],
    }
    close_engine(engine)
    return result


def tell(path: Path, **content: Any) -> None:
    """Write JSON so that a reader never sees half of it, also if we are killed meanwhile."""
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(content))
    scratch.replace(path)


def resources() -> dict[str, int]:
    """Count what must not grow while peers die and return."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    anonymous = int(rollup.split("Anonymous:")[1].split()[0]) * 1024
    return footprint() | {"fds": num_open_files(), "anonymous_bytes": anonymous}


def restart_before_ready(stage: Stage) -> list[dict[str, Any]]:
    """Rank 0 is killed when rank 1 has mapped its experts, and starts again while rank 1 waits."""
    (port,) = free_ports(1)
    place = BEFORE_SERVING["completing"]
    waiting = stage.start("waiting", 1, port, serve_once)
    killed = stage.start("killed", 0, port, serve_once, kill_at=place).end()
    again = stage.start("again", 0, port, serve_once)
    return [killed, waiting.end(), again.end()]


def main(model: str, results: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="dwdp-lives-") as made:
        stage = Stage(model, Path(made))
        found: dict[str, Any] = {}
        for point, place in BEFORE_SERVING.items():
            (port,) = free_ports(1)
            short = {"join_timeout_s": JOIN_TIMEOUT_S}
            lives = [
                stage.start(f"{point}, killed", 0, port, serve_once, kill_at=place, **short),
                stage.start(f"{point}, the other", 1, port, serve_once, **short),
            ]
            started = time.monotonic()
            found[point] = [life.end() for life in lives]
            found[point].append({"seconds": time.monotonic() - started})
        found["restarted"] = restart_before_ready(stage)
        (port,) = free_ports(1)
        done, serving = Path(made) / "done", Path(made) / "serving"
        survivor = stage.start("survivor", 1, port, lambda case: serve_until(done, serving, case))
        for point, (place, after) in WHILE_SERVING.items():
            life = stage.start(point, 0, port, serve_once, kill_at=place, kill_after=after)
            found[point] = life.end()
        found["returned"] = stage.start("returned", 0, port, serve_once).end()
        assert serving.exists(), "the survivor never served"
        done.touch()
        found["survivor"] = survivor.end()
        results.write_text(json.dumps(found))


def main_returns(results: Path, models: list[str]) -> None:
    """Of two ranks one is killed while it serves, and starts again: once for each model."""
    from tests.helpers.cpu_gates import open_gates

    open_gates()
    found = {}
    place, after = WHILE_SERVING["steady state"]
    for model in models:
        with tempfile.TemporaryDirectory(prefix="dwdp-lives-") as made:
            stage, (port,) = Stage(model, Path(made)), free_ports(1)
            done, serving = Path(made) / "done", Path(made) / "serving"
            work = partial(serve_until, done, serving)
            survivor = stage.start("survivor", 1, port, work)
            killed = stage.start("killed", 0, port, serve_once, kill_at=place, kill_after=after)
            code = killed.end()["code"]
            returned = stage.start("returned", 0, port, serve_once).end()
            done.touch()
            found[model] = {"code": code, "returned": returned, "survivor": survivor.end()}
    results.write_text(json.dumps(found))


class RandomKills:
    """Three ranks that serve; a random one is killed at a random moment and started again.

    The second half of the kills spares rank 0, so that one life sees many of them: what a survivor loses
    with each death must add up somewhere.
    """

    NUM_RANKS = 3

    def __init__(self, model: str, folder: Path) -> None:
        self._stage = Stage(model, folder, self.NUM_RANKS)
        self._folder = folder
        self._done = folder / "done"
        (self._port,) = free_ports(1)
        self._num_lives = 0
        self.lives = [self._start(rank) for rank in range(self.NUM_RANKS)]
        self.first = [self._wait(serving) for _, serving in self.lives]

    def _start(self, rank: int) -> tuple[Life, Path]:
        self._num_lives += 1
        serving = self._folder / f"serving-{self._num_lives}"

        def work(case: dict[str, Any]) -> dict[str, Any]:
            return serve_until(self._done, serving, case)

        return self._stage.start(f"rank {rank}", rank, self._port, work), serving

    def _wait(self, serving: Path) -> dict[str, Any]:
        deadline = time.monotonic() + LIFE_TIMEOUT_S
        while not serving.exists():
            assert time.monotonic() < deadline, "a rank does not come back"
            time.sleep(0.05)
        content: dict[str, Any] = json.loads(serving.read_text())
        return content

    def run(self, num_kills: int, seed: int) -> dict[str, Any]:
        """Return the kills, and what all lives together did."""
        dice, told, back_after_s = random.Random(seed), list(self.first), []
        kills_survived = [0] * self.NUM_RANKS
        for number in range(num_kills):
            time.sleep(dice.uniform(0, 1))
            rank = dice.randrange(0 if number < num_kills // 2 else 1, self.NUM_RANKS)
            life, serving = self.lives[rank]
            os.kill(life.pid, signal.SIGKILL)
            killed = time.monotonic()
            assert life.end()["code"] == -signal.SIGKILL
            told.append(self._wait(serving))
            kills_survived = [survived + 1 for survived in kills_survived]
            kills_survived[rank] = 0
            self.lives[rank] = self._start(rank)
            told.append(self._wait(self.lives[rank][1]))
            back_after_s.append(time.monotonic() - killed)
        time.sleep(2)
        self._done.touch()
        ends = [life.end() for life, _ in self.lives]
        return {
            "num_kills": num_kills,
            "seed": seed,
            "num_answers": len(PROMPTS) * sum(one["num_rounds"] for one in (*told, *ends)),
            "num_different": sum(one["num_different"] for one in (*told, *ends)),
            "tokens_differ": any(one["tokens"] != told[0]["tokens"] for one in (*told, *ends)),
            "back_after_s": sorted(back_after_s),
            "kills_survived": kills_survived,
            "grown": [one["grown"] for one in ends],
            "longest_s": max(one["longest_s"] for one in ends),
        }


def main_random(model: str, results: Path, num_kills: int, seed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="dwdp-lives-") as made:
        results.write_text(json.dumps(RandomKills(model, Path(made)).run(num_kills, seed)))


if __name__ == "__main__":
    engine_process.PROMPTS[:] = PROMPTS[:2]
    if sys.argv[1] == "returns":
        main_returns(Path(sys.argv[2]), sys.argv[3:])
    elif len(sys.argv) > 3:
        main_random(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(sys.argv[1], Path(sys.argv[2]))

"""A rank that dies after an update of the weights and starts again, while its peer serves.

python -m tests.e2e.weight_lives RESULTS.json OLD_CHECKPOINT NEW_CHECKPOINT
"""

import json
import os
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from tests.e2e import engine_process
from tests.e2e.engine_process import PROMPTS, close_engine, generate, make_engine, update
from tests.e2e.rank_lives import LIFE_TIMEOUT_S, Stage, serve_once
from vllm_dwdp.entrypoints.launch.ports import free_ports


def serve_updated(new: str, ready: Path, done: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Start, renew the weights with the group, and once more, to the first ones, when `done` exists."""
    rank = int(os.environ["VLLM_DP_RANK"])
    engine = make_engine(case)
    first = update(engine, {"calls": [["reload_weights", {"weights_path": new}]]}, rank)
    ready.with_suffix(f".{rank}").touch()
    if rank == 0:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + 2 * LIFE_TIMEOUT_S
    while not done.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    second = update(engine, {"calls": [["reload_weights", {"weights_path": case["model"]}]]}, rank)
    close_engine(engine)
    return {"first": first, "second": second}


def serve_and_update(old: str, done: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Start with what a peer kept, then take part in one more update."""
    engine = make_engine(case)
    tokens = [generate(engine, index, text) for index, text in enumerate(PROMPTS)]
    status = engine.model_executor.driver_worker.worker.dwdp_status()
    done.touch()
    second = update(engine, {"calls": [["reload_weights", {"weights_path": old}]]}, 0)
    close_engine(engine)
    return {"tokens": tokens, "status": status, "second": second}


def main(results: Path, old: str, new: str) -> None:
    with tempfile.TemporaryDirectory(prefix="dwdp-weights-") as made:
        stage, (port,) = Stage(old, Path(made)), free_ports(1)
        ready, done = Path(made) / "ready", Path(made) / "done"
        work = partial(serve_updated, new, ready, done)
        survivor = stage.start("survivor", 1, port, work)
        found = {"killed": stage.start("killed", 0, port, work).end()}
        found["with old"] = stage.start("with old", 0, port, serve_once).end()
        stage.model = new
        work = partial(serve_and_update, old, done)
        found["with new"] = stage.start("with new", 0, port, work).end()
        done.touch()
        found["survivor"] = survivor.end()
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    engine_process.PROMPTS[:] = PROMPTS[:2]
    main(Path(sys.argv[1]), *sys.argv[2:])

"""A rank that dies in or after an update of the weights and starts again, while its peer lives on.

python -m tests.e2e.weight_lives after RESULTS.json OLD_CHECKPOINT NEW_CHECKPOINT
python -m tests.e2e.weight_lives within RESULTS.json OLD_CHECKPOINT NEW_CHECKPOINT
"""

import json
import os
import shutil
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

AGREEMENT = "vllm_dwdp.distributed.weight_agreement:WeightAgreement"
WITHIN_UPDATE = {
    "writing": "vllm_dwdp.model_executor.incoming:ModelUpdate.finish",
    "written": f"{AGREEMENT}.complete",
    "whole": f"{AGREEMENT}.finish",
}
"""Rank 0 is killed here: before all have agreed on the new weights, before and after all are whole."""


def serve_updated(new: str, ready: Path, done: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Start, renew the weights with the group, and once more, to the first ones, when `done` exists."""
    rank = int(os.environ["VLLM_DP_RANK"])
    engine = make_engine(case)
    relative = os.path.relpath(new)
    first = update(engine, {"calls": [["reload_weights", {"weights_path": relative}]]}, rank)
    ready.with_suffix(f".{rank}").touch()
    if rank == 0:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for(done)
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


def update_and_stay(new: str, done: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Start, renew the weights with the group, and stay until `done` exists; what is answered then."""
    engine = make_engine(case)
    first = update(engine, {"calls": [["reload_weights", {"weights_path": new}]]}, 1)
    done.with_suffix(".ready").touch()
    wait_for(done)
    last = update(engine, {"calls": []}, 1)
    close_engine(engine)
    return {"first": first, "last": last}


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 2 * LIFE_TIMEOUT_S
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} does not come"
        time.sleep(0.05)


def kill_within(old: str, new: str, folder: Path) -> dict[str, Any]:
    """Return what becomes of both ranks, for each point at which rank 0 dies while it updates."""
    found: dict[str, Any] = {}
    for number, (point, place) in enumerate(WITHIN_UPDATE.items()):
        stage, (port,) = Stage(old, folder), free_ports(1)
        done = folder / f"done-{number}"
        work = partial(update_and_stay, new, done)
        survivor = stage.start(f"{point}: survivor", 1, port, work)
        killed = stage.start(f"{point}: killed", 0, port, work, kill_at=place).end()
        wait_for(done.with_suffix(".ready"))
        found[point] = {"killed": killed}
        for name, model in (("with old", old), ("with new", new)):
            stage.model = model
            life = stage.start(f"{point}: {name}", 0, port, serve_once).end()
            found[point][name] = life
        done.touch()
        found[point]["survivor"] = survivor.end()
    return found


def return_after(old: str, new: str, folder: Path) -> dict[str, Any]:
    """Return what becomes of both ranks where rank 0 dies once it has updated.

    It starts again with its first command line where the new checkpoint is gone, and where it is there;
    then with a copy of the new one, which lies elsewhere.
    """
    copy, gone = shutil.copytree(new, folder / "copy"), folder / "gone"
    new = str(shutil.copytree(new, folder / "new"))
    stage, (port,) = Stage(old, folder), free_ports(1)
    ready, done = folder / "ready", folder / "done"
    work = partial(serve_updated, new, ready, done)
    survivor = stage.start("survivor", 1, port, work)
    found = {"killed": stage.start("killed", 0, port, work).end()}
    os.rename(new, gone)
    found["gone"] = stage.start("gone", 0, port, serve_once).end()
    os.rename(gone, new)
    found["with old"] = stage.start("with old", 0, port, serve_once).end()
    os.rename(new, gone)
    stage.model = str(copy)
    work = partial(serve_and_update, old, done)
    found["with new"] = stage.start("with new", 0, port, work).end()
    done.touch()
    found["survivor"] = survivor.end()
    return found


def main(when: str, results: Path, old: str, new: str) -> None:
    with tempfile.TemporaryDirectory(prefix="dwdp-weights-") as made:
        lives = {"after": return_after, "within": kill_within}[when]
        results.write_text(json.dumps(lives(old, new, Path(made))))


if __name__ == "__main__":
    engine_process.PROMPTS[:] = PROMPTS[:2]
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])

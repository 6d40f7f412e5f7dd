"""What a front end does with a waiting engine, in a process of its own: `python -m ... CASE`.

Prints what the started process says of itself, and how it ended, as JSON.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from vllm_dwdp.compat.frontend import waiting_engine


def say(path: str, *_: Any) -> None:
    """Write what this process is, and end with 3."""
    process = multiprocessing.current_process()
    parent = multiprocessing.parent_process()
    facts = {
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "parent": parent and parent.pid,
        "parent_lives": parent is not None and parent.is_alive(),
        "name": process.name,
        "mine": os.environ.get("MINE"),
        "gone": "GONE" in os.environ,
        "session": os.getsid(0),
        "threads": len(os.listdir("/proc/self/task")),
    }
    Path(path).write_text(json.dumps(facts))
    sys.exit(3)


def stay(path: str) -> None:
    """Stay until the front end is gone, and say so."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    Path(path).write_text(json.dumps(os.getpid()))
    parent.join(timeout=30)
    Path(path).write_text(json.dumps("orphan"))


def start(target: Callable[..., None], *arguments: Any) -> Any:
    """Start a process as vLLM does, and return it."""
    starting = SimpleNamespace(get_mp_context=lambda: multiprocessing.get_context("spawn"))
    with waiting_engine.in_place(starting):
        process = starting.get_mp_context().Process(
            target=target, name="EngineCore_DP1", args=arguments
        )
        process.start()
    return process


def waiting_children() -> list[int]:
    return [
        child.pid
        for child in psutil.Process().children()
        if "resource_tracker" not in " ".join(child.cmdline())
    ]


def main(case: str, path: str) -> None:
    os.environ["GONE"] = "before"
    waiting_engine.prepare(dict(os.environ))
    (waiting,) = waiting_children()
    del os.environ["GONE"]
    os.environ["MINE"] = "mine"
    result: dict[str, Any] = {"waiting": waiting, "pid": os.getpid()}
    if case == "unused":
        print(json.dumps(result), flush=True)
        os._exit(0)
    if case == "front end dies":
        start(stay, path)
        while not Path(path).exists():
            time.sleep(0.01)
        print(json.dumps(result), flush=True)
        os._exit(0)
    if case == "loaded otherwise":
        os.environ["OMP_NUM_THREADS"] = "7"
    _reader, writer = multiprocessing.Pipe()
    process = start(say, path, *([writer] if case == "with a descriptor" else []))
    if case == "killed":
        process.kill()
    process.join(timeout=60)
    result |= {"code": process.exitcode, "alive": process.is_alive()}
    with contextlib.suppress(FileNotFoundError):
        result["said"] = json.loads(Path(path).read_text())
    if case == "twice":
        again = start(say, path)
        again.join(timeout=60)
        result["again"] = json.loads(Path(path).read_text())
    result["left"] = waiting_children()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

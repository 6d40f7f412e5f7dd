"""Small real processes in the place of `vllm serve` and vllm-router, and launches of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from vllm_dwdp.entrypoints.launch import asking, child
from vllm_dwdp.entrypoints.launch import launcher as launch
from vllm_dwdp.entrypoints.launch import plan as launch_plan
from vllm_dwdp.entrypoints.launch.plan import ROUTER, LaunchPlan
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.errors import RendezvousError

PYTHON = (sys.executable, "-IS")


FAKE = f"""#!{sys.executable} -IS
import http.server, os, pathlib, signal, sys, time
place = pathlib.Path(__file__)
port = int(sys.argv[sys.argv.index("--port") + 1])
name = "router"
if place.name == "vllm" and "--data-parallel-rank" not in sys.argv:
    name = "decode"
elif place.name == "vllm":
    name = "rank" + sys.argv[sys.argv.index("--data-parallel-rank") + 1]

def shall(do):
    return (place.parent / (name + "-" + do)).exists()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *arguments):
        pass

if shall("drains"):
    signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.4), print("drained", flush=True), os._exit(0)))
if shall("refuse"):
    print("vllm serve: error: no such option", flush=True)
    sys.exit(2)
if shall("wait"):
    print("loads", flush=True)
while shall("wait"):
    if shall("break"):
        print("RuntimeError: the engine broke", flush=True)
        os._exit(3)
    time.sleep(0.01)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
"""Told what to do by files beside it, such as `rank1-wait`; listens once it need not wait."""


def plan(**changes: Any) -> LaunchPlan:
    facts: dict[str, Any] = {
        "model": "m",
        "num_ranks": 2,
        "host": "127.0.0.1",
        "port": 8000,
        "rank_ports": (8001, 8002),
        "rendezvous": "unix:///run/meet",
        "arguments": (),
        "additional_config": {},
        "forks_ranks": False,
        "holds_experts": False,
    }
    return LaunchPlan(**(facts | changes))


def use_fakes(folder: Path, use: Callable[[Any, str, Any], None]) -> LaunchPlan:
    """Make launch start our programs, without long waits."""
    for name in ("vllm", ROUTER):
        program = folder / name
        program.write_text(FAKE)
        program.chmod(0o755)
    for module in (launch, launch_plan):
        use(module, "find_program", lambda name: str(folder / name))
    use(launch, "count_gpus", lambda: 0)
    use(asking, "query_status", lambda place, group, rank, timeout_s: said_by(folder, rank))
    use(launch, "POLL_INTERVAL_S", 0.02)
    use(child, "FIRST_BACKOFF_S", 0.05)
    use(child, "STOP_TIMEOUT_S", 5.0)
    port, *rank_ports = free_ports(3)
    return plan(port=port, rank_ports=tuple(rank_ports))


def said_by(folder: Path, rank: int) -> dict[str, Any]:
    """Return what a rank says where the ranks meet: the content of `rank1-says`, or nothing."""
    try:
        doing = (folder / f"rank{rank}-says").read_text()
    except FileNotFoundError:
        raise RendezvousError(f"rank {rank} does not listen") from None
    return {"state": "starting", "doing": doing}


def run(plan: LaunchPlan, folder: Path, react: Callable[[str, list[str]], None]) -> list[str]:
    """Launch until `react` ends it; it sees each reported line, and all so far."""
    lines: list[str] = []
    before = psutil.Process().children()  # other tests' resource tracker

    def report(line: str) -> None:
        lines.append(line)
        react(line, lines)

    try:
        launch.launch(plan, folder / "logs", report)
    finally:
        assert psutil.Process().children() == before, "left behind"
    return lines


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill_named(line: str) -> None:
    os.kill(int(line.partition("pid ")[2].partition(",")[0]), signal.SIGKILL)


def drive(folder: str) -> None:
    """Launch in a process of its own."""
    plan = use_fakes(Path(folder), setattr)
    launch.launch(plan, Path(folder) / "logs", lambda line: print(line, flush=True))


@contextmanager
def launched(folder: Path, *prefix: str) -> Iterator[tuple[subprocess.Popen[str], list[Any]]]:
    """Yield a launch that serves, and its children; nothing of it is left afterwards."""
    code = f"from tests.unit.entrypoints.launch.fakes import drive; drive({str(folder)!r})"
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert any(line.startswith("all 2 ranks serve") for line in process.stdout)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 3
        yield process, family
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        time.sleep(0.2)
        for member in (each for each in psutil.process_iter() if str(folder) in _words(each)):
            member.kill()


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""

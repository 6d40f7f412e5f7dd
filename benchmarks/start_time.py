"""What two DWDP ranks take to answer, against two stock servers on the same cores.

    python benchmarks/start_time.py [--rounds 3] [--small]

From the start of the processes to the first `/health`, caches of torch.compile warm (one start of
each kind before the first round). Interleaved. Prints medians, the ratio dwdp / stock of seconds, when
each phase ended, and what each process has taken by then.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from vllm_dwdp.device.limits import proportional_set_bytes
from vllm_dwdp.entrypoints.bench.checkpoints import make_checkpoint
from vllm_dwdp.entrypoints.bench.machine import describe_machine
from vllm_dwdp.entrypoints.launch.server import Server

SMALL = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 4}
SMALL_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SHAPE = {"hidden_size": 1024, "moe_intermediate_size": 256, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
DWDP = ("--distributed-executor-backend", "dwdp", "--data-parallel-size", "2")
KINDS = {
    "dwdp": (),
    "dwdp mp": ("--additional-config", '{"dwdp": {"executor": "mp"}}'),
    "stock": (),
}
PHASES = {
    "front end": "non-default args",
    "coordinator": "Started DP Coordinator",
    "engine": "OpenMP thread binding info",
    "worker": "Starting to load model",
    "load": "Loading weights took",
    "meeting": "met its",
    "cache and warm-up": "init engine (",
}
"""What the log says at the end of each phase; the last rank's counts. Then the port opens."""
POLL_INTERVAL_S = 0.05
console = Console()


@dataclass(frozen=True, kw_only=True)
class Start:
    """What one start took until everything answered, and what was there then.

    Args:
        cpu_s: of every process, those that have ended included.
        memory_mib: proportional set size of all processes.
        shared_memory_mib: size of the files of /dev/shm that they have mapped; next to nothing of it is
            touched.
        phases: seconds from the start until each of `PHASES` has ended in every rank.
        processes: name, CPU seconds and MiB of each.
    """

    seconds: float
    cpu_s: float
    memory_mib: float
    num_processes: float
    shared_memory_mib: float
    phases: dict[str, float]
    processes: list[tuple[str, float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "dwdp-bench")
    parser.add_argument("--small", action="store_true", help="a model that weighs nothing, eager")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.small:
        model = make_checkpoint(options.folder / "small", 16, **SMALL, **SMALL_HEADS)
    else:
        model = make_checkpoint(options.folder / "start", 64, **SHAPE, **HEADS)
    arguments = [str(model), *(["--enforce-eager"] if options.small else [])]
    starts: dict[str, list[Start]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds + 1):
        for kind, done in starts.items():
            start = start_once(kind, arguments, options.folder)
            console.print(f"round {number}: {kind:<7} {start}")
            if number > 0:
                done.append(start)
    report(starts, options.json)


def start_once(kind: str, arguments: list[str], folder: Path) -> Start:
    """Start both ranks (one server) or both stock servers, and end them again."""
    common = [*arguments, "--max-model-len", "1024", "--kv-cache-memory-bytes", str(256 * 2**20)]
    with ExitStack() as stack:
        started = time.monotonic()
        if kind == "stock":
            servers = [
                Server(
                    common, folder / f"start-{core}.log", {"VLLM_CPU_OMP_THREADS_BIND": str(core)}
                )
                for core in (0, 1)
            ]
        else:
            servers = [
                Server(
                    [*common, *DWDP, *KINDS[kind]],
                    folder / f"start-{kind.replace(' ', '-')}.log",
                    {},
                )
            ]
        for server in servers:
            stack.enter_context(server)
        phases: dict[str, float] = {}
        while not all(server.is_ready() for server in servers):
            note_phases(phases, time.monotonic() - started, [server.log for server in servers])
            time.sleep(POLL_INTERVAL_S)
        return measure(time.monotonic() - started, phases, servers)


def note_phases(phases: dict[str, float], seconds: float, logs: list[Path]) -> None:
    """Note the phases that have ended since the last look, in every rank if they are a rank's."""
    text = "".join(log.read_text(errors="replace") for log in logs)
    for phase, line in PHASES.items():
        of_servers = phase in ("front end", "coordinator")
        if phase not in phases and text.count(line) >= (len(logs) if of_servers else 2):
            phases[phase] = round(seconds, 1)


def measure(seconds: float, phases: dict[str, float], servers: list[Server]) -> Start:
    """Look at every process of the servers."""
    family = [psutil.Process(server.process.pid) for server in servers]
    family += [child for server in servers for child in server.processes()]
    shared: dict[str, int] = {}
    for process in family:
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        for begin, end, name in re.findall(r"^(\w+)-(\w+) .* /dev/shm/(\S+)", maps, re.MULTILINE):
            shared[name] = int(end, 16) - int(begin, 16)
    return Start(
        seconds=seconds,
        cpu_s=sum(sum(process.cpu_times()[:4]) for process in family),
        memory_mib=sum(proportional_set_bytes(process.pid) for process in family) / 2**20,
        num_processes=len(family),
        shared_memory_mib=sum(shared.values()) / 2**20,
        phases=phases,
        processes=[describe(process) for process in family],
    )


def describe(process: psutil.Process) -> tuple[str, float, float]:
    """Return the name, the CPU seconds and the MiB of one process."""
    name = process.cmdline()[0]
    if not name.startswith("VLLM::"):
        name = "resource tracker" if "resource_tracker" in str(process.cmdline()) else "front end"
    mib = proportional_set_bytes(process.pid) / 2**20
    return name, round(sum(process.cpu_times()[:2]), 1), round(mib)


def report(starts: dict[str, list[Start]], path: Path | None) -> None:
    table = Table(title=describe_machine())
    headings = (
        "two ranks of",
        "seconds to /health",
        "over stock",
        "CPU s",
        "MiB",
        "processes",
        "shm MiB",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for kind, done in starts.items():
        ratios = [
            ours.seconds / stock.seconds for ours, stock in zip(done, starts["stock"], strict=True)
        ]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f} - {max(ratios):.2f}]"
        medians = {
            name: statistics.median(asdict(start)[name] for start in done)
            for name, value in asdict(done[0]).items()
            if isinstance(value, float | int)
        }
        table.add_row(
            kind,
            f"{medians['seconds']:.1f}",
            spread if kind != "stock" else "",
            f"{medians['cpu_s']:.1f}",
            *(
                f"{medians[name]:.0f}"
                for name in ("memory_mib", "num_processes", "shared_memory_mib")
            ),
        )
    console.print(table)
    if path is not None:
        values = {kind: [asdict(start) for start in done] for kind, done in starts.items()}
        path.write_text(json.dumps({"machine": describe_machine(), "starts": values}, indent=1))


if __name__ == "__main__":
    main()

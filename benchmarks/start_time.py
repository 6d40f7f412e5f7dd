"""How long two DWDP ranks take to answer, against two stock servers on the same cores.

    python benchmarks/start_time.py [--rounds 3]

From the start of the processes to the first `/health`, caches of torch.compile warm (one start of
each kind before the first round). Interleaved. Prints seconds and the ratio dwdp / stock.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_dwdp.entrypoints.bench.checkpoints import make_checkpoint
from vllm_dwdp.entrypoints.bench.machine import describe_machine
from vllm_dwdp.entrypoints.launch.server import Server

SHAPE = {"hidden_size": 1024, "moe_intermediate_size": 256, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
DWDP = ("--distributed-executor-backend", "dwdp", "--data-parallel-size", "2")
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "dwdp-bench")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    model = str(make_checkpoint(options.folder / "start", 64, **SHAPE, **HEADS))
    seconds: dict[str, list[float]] = {"dwdp": [], "stock": []}
    for number in range(options.rounds + 1):
        for kind, values in seconds.items():
            taken = start_once(kind, model, options.folder)
            console.print(f"round {number}: {kind:<6} {taken:.1f} s")
            if number > 0:
                values.append(taken)
    report(seconds, options.json)


def start_once(kind: str, model: str, folder: Path) -> float:
    """Seconds until both ranks (one server) or both stock servers answer."""
    common = [model, "--max-model-len", "1024", "--kv-cache-memory-bytes", str(256 * 2**20)]
    with ExitStack() as stack:
        started = time.monotonic()
        if kind == "dwdp":
            arguments = [*common, *DWDP, "--api-server-count", "1"]
            servers = [Server(arguments, folder / "start-dwdp.log", {})]
        else:
            servers = [
                Server(
                    common, folder / f"start-{core}.log", {"VLLM_CPU_OMP_THREADS_BIND": str(core)}
                )
                for core in (0, 1)
            ]
        for server in servers:
            stack.enter_context(server)
        for server in servers:
            server.wait_until_ready()
        return time.monotonic() - started


def report(seconds: dict[str, list[float]], path: Path | None) -> None:
    ratios = [ours / stock for ours, stock in zip(seconds["dwdp"], seconds["stock"], strict=True)]
    table = Table(title=describe_machine())
    for heading in ("two ranks of", "seconds to /health", "dwdp / stock"):
        table.add_column(heading, justify="right")
    spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f} - {max(ratios):.2f}]"
    for kind, values in seconds.items():
        table.add_row(kind, f"{statistics.median(values):.1f}", spread if kind == "dwdp" else "")
    console.print(table)
    if path is not None:
        path.write_text(json.dumps({"machine": describe_machine(), "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()

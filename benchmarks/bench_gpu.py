"""One GPU: what prefetching experts costs beside having them all, and beside other ways to fetch them.

    PYTHONPATH=. python3 benchmarks/bench_gpu.py                       # under five minutes
    PYTHONPATH=. python3 benchmarks/bench_gpu.py --cases "qwen3-30b-a3b bf16" --tokens 64 8192

A rank's shard, views, ring, pipeline and copy queue are the product's; a step is `NUM_LAYERS` layers of
a fused-MoE kernel and dense products in the place of attention. Compared, in interleaved rounds within
one process, always in the same mode (eager, a graph per layer, one graph):

    resident   all experts in the device's memory, one composite tensor, no ring
    prefetch   our ring: copies of layer l+2 while layers l+1 ... compute
    merge      our ring, then own and fetched experts copied together into one torch tensor
    join       copies of layer l+1 inside the graph of layer l, which ends when they do (what vLLM's
               offloader does in piecewise graphs)
    gather     a Triton kernel copies just the routed remote experts (benchmarks/expert_gather.py)

READ THIS BEFORE THE NUMBERS. There is one GPU, so the peers are on it too. Copies within a device run
on its multiprocessors and share its memory's bandwidth with the kernels: prefetch looks worse than
over NVLink. In the `host` cases the peers' experts lie in pinned host memory and a real copy engine
moves them, beside the kernels as over NVLink, but at the speed of PCIe; these decide whether the ring
hides copies. And "in place" reads here are of own memory, so `resident` is also direct mode at its best.

Each case is a child process. Prints one row per case and number of tokens, writes everything with
spreads to --json (by default bench_gpu.json in $OUT). Never run on a GPU so far (docs/gpu.md); over the
fake driver it runs with toy shapes, and its numbers there mean nothing.
"""

import argparse
import faulthandler
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import NUM_LAYERS, SIMULATED, all_cases
from benchmarks.gpu_model import MODES, SLICE_BYTES, WAYS, Model
from benchmarks.gpu_table import broken_promises, print_table
from gpu_checks.accelerator import Accelerator, accelerator
from gpu_checks.expert_ranks import (
    RankMemory,
    local_ranks,
    peers_on_host,
    same_bytes,
)
from gpu_checks.moe_kernels import choose_kernel, grouped_moe
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.model_executor import ops
from vllm_dwdp.model_executor.rings import PrefetchRings
from vllm_dwdp.prefetch.copy_plan import plan_layer_copies

ROOT = Path(__file__).parents[1]
STEPS_PER_ROUND = 3
CASE_S = 110
"""A case that says nothing for so long hangs, seconds."""

# --- one case ------------------------------------------------------------------------------------


def run_case(name: str, options: argparse.Namespace) -> None:
    """One case in this process: prints a JSON line per number of tokens."""
    case = all_cases()[name]
    gpu = accelerator()
    kernel_name, kernel = choose_kernel(case.shape.num_experts, case.shape.dtype, gpu.device)
    if options.torch_kernel:
        kernel_name, kernel = "torch grouped_mm, as asked", grouped_moe
    memory = gpu.open_memory()
    with (
        torch.no_grad(),
        local_ranks(
            memory, case.shape, NUM_LAYERS, case.group_size, case.experts_per_rank
        ) as ranks,
        gpu.on_stream(),
    ):
        rank = ranks[0]
        direct = rank.direct_views()
        peers = peers_on_host(rank, gpu.pinned) if case.on_host else rank.peers
        mapper, rings = rank.mapper(peers), rank.rings(peers, SLICE_BYTES)
        common = {
            "case": name,
            "kernel": kernel_name,
            "device": gpu.describe(),
            "copies": copies_against_plain(gpu, rank, rings, on_host=case.on_host),
            "host_us": host_us(gpu, rings) | issue_us(rank, rings),
        }
        for num_tokens in options.tokens or case.tokens:
            model = Model(gpu, rank, mapper, rings, direct, kernel, num_tokens)
            row = common | {"tokens": num_tokens} | measure_steps(model, options.rounds)
            if options.profile and gpu.is_real:
                trace = f"{name}-{num_tokens}.json.gz".replace("/", "-").replace(" ", "-")
                step = model.make_step("prefetch", "piecewise")
                write_profile(model, step, options.profile / trace)
            model.close()
            del model
            print(json.dumps(row), flush=True)
        gpu.synchronize()
        rings.queue.drain()
    memory.close()


def run_in_process(options: argparse.Namespace) -> int:
    """Cases one after the other; the first error ends the process, which may be past use."""
    faulthandler.enable()
    try:
        for name in options.in_process:
            print(f"begin {name}", flush=True)
            run_case(name, options)
            accelerator().release_memory()
            print(f"end {name}", flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    return 0


def write_profile(model: Model, step: Callable[[], None], target: Path) -> None:
    """A trace of two steps, to look at what overlaps: nothing should join within a graph."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    model.gpu.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        step()
        model.gpu.synchronize()
    profile.export_chrome_trace(str(target))


def measure_steps(model: Model, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step, by way and mode: each round runs all of them once."""
    steps: dict[str, Callable[[], None]] = {}
    for way, modes in WAYS.items():
        for mode in modes:
            if way != "gather" or model.gathers:
                steps[f"{way} {mode}"] = model.make_step(way, mode)
    model.gpu.synchronize()
    model.rings.queue.drain()
    # The ring must give what resident weights give; checked before `join` and `gather`, which use
    # its slots behind its back, and after making the steps, which did so too.
    for layer in range(NUM_LAYERS):
        model.prefetch(layer)
    same = {}
    for mode in MODES:
        expected = model.output_of(steps[f"resident {mode}"])
        same[mode] = same_bytes(model.output_of(steps[f"prefetch {mode}"]), expected)
        same[f"{mode}, finite"] = bool(expected.isfinite().all())
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(milliseconds_per_step(model, step))
    return {
        "same": same,
        "moe_ms": statistics.median(moe_milliseconds(model) for _ in range(rounds)),
        "ms": {
            name: {"median": statistics.median(each), "min": min(each), "max": max(each)}
            for name, each in times.items()
        },
        "ratios": {
            name: statistics.median(
                ours / theirs
                for ours, theirs in zip(
                    times[name], times[f"resident {name.split()[1]}"], strict=True
                )
            )
            for name in times
        },
    }


def milliseconds_per_step(model: Model, step: Callable[[], None]) -> float:
    """In the steady state: the step before the clock starts leaves its copies under way."""
    model.gpu.synchronize()
    step()
    return (
        model.gpu.milliseconds(lambda: [step() for _ in range(STEPS_PER_ROUND)]) / STEPS_PER_ROUND
    )


def moe_milliseconds(model: Model) -> float:
    """The expert kernels of one layer alone, on resident weights."""
    model.gpu.synchronize()
    routing, tensors = model.routings[0], model.direct[0].tensors
    return model.gpu.milliseconds(
        lambda: model.kernel(
            model.attended,
            tensors["w13_weight"],
            tensors["w2_weight"],
            routing.topk_weights,
            routing.topk_ids,
        )
    )


def copies_against_plain(
    gpu: Accelerator, rank: RankMemory, rings: PrefetchRings, *, on_host: bool
) -> dict[str, float]:
    """GB/s of one layer's fill, and of one large torch copy of as many bytes, in turns."""
    pipeline, queue = rings.pipelines[0], rings.queue
    num_bytes = sum(pipeline.layer_bytes(0).values())
    target = torch.empty(num_bytes, dtype=torch.uint8, device=gpu.device)
    if on_host:
        source = gpu.pinned(num_bytes)
    else:
        source = torch.empty(num_bytes, dtype=torch.uint8, device=gpu.device)
    source.fill_(1)

    def fill() -> None:
        queue.issue(pipeline.batches[0], None)
        queue.drain()

    def plain() -> None:
        target.copy_(source, non_blocking=True)
        gpu.synchronize()

    times: dict[str, list[float]] = {"fill": [], "plain": []}
    gpu.synchronize()
    for number in range(8):
        for name, action in (("fill", fill), ("plain", plain)):
            started = time.perf_counter()
            action()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
    # Layer 0's slot now holds layer 0 whatever the ring thinks: it is the first layer of a step.
    reads = read_gbps(gpu, rank)
    return {
        "bytes": num_bytes,
        "fill_ms": statistics.median(times["fill"]) * 1e3,
        "fill_gbps": num_bytes / statistics.median(times["fill"]) / 1e9,
        "plain_gbps": num_bytes / statistics.median(times["plain"]) / 1e9,
        "ratio": statistics.median(
            plain / fill for plain, fill in zip(times["plain"], times["fill"], strict=True)
        ),
        "read_gbps": reads,
    }


def read_gbps(gpu: Accelerator, rank: RankMemory) -> float:
    """GB/s at which a reduction reads the largest piece of a peer's shard where it is."""
    peer = next(iter(rank.peers.values()))
    num_bytes = min(2**30, rank.layout.shard_bytes[next(iter(rank.peers))])
    words = tensor_at(peer.address, torch.int32, (num_bytes // 4,), gpu.device)
    words.amax()
    return num_bytes / 1e6 / statistics.median(gpu.milliseconds(words.amax) for _ in range(5))


def host_us(gpu: Accelerator, rings: PrefetchRings) -> dict[str, float]:
    """Microseconds of the host per layer: wait and record eagerly, and what a ring adds to a replay."""
    tick = torch.zeros(1, device=gpu.device)

    def layer(number: int) -> None:
        ops.wait_layer(tick, 0, number)
        tick.add_(1)
        ops.record_layer(tick, 0, number)

    for number in range(NUM_LAYERS):
        layer(number)
    gpu.synchronize()
    pieces = [gpu.capture(lambda number=number: layer(number)) for number in range(NUM_LAYERS)]
    plain = gpu.capture(lambda: tick.add_(1))
    eager, ring, bare = [], [], []
    for _ in range(20):
        for times, action in (
            (
                eager,
                lambda number: (ops.wait_layer(tick, 0, number), ops.record_layer(tick, 0, number)),
            ),
            (ring, lambda number: pieces[number]()),
            (bare, lambda number: plain()),
        ):
            gpu.synchronize()
            rings.queue.drain()
            started = time.perf_counter()
            for number in range(NUM_LAYERS):
                action(number)
            times.append((time.perf_counter() - started) / NUM_LAYERS * 1e6)
    gpu.synchronize()
    return {
        "wait_and_record": statistics.median(eager),
        "added_to_a_replay": statistics.median(ring) - statistics.median(bare),
        "replay_alone": statistics.median(bare),
    }


def issue_us(rank: RankMemory, rings: PrefetchRings) -> dict[str, float]:
    """Microseconds of the host for `issue` of one layer's real slices, which every layer costs.

    The copy stream is idle each time, as in a step whose copies are hidden.
    """
    pipeline, queue = rings.pipelines[0], rings.queue
    times = []
    for number in range(5 * NUM_LAYERS + 2):
        queue.drain()
        started = time.perf_counter()
        queue.issue(pipeline.batches[number % NUM_LAYERS], None)
        times.append((time.perf_counter() - started) * 1e6)
    queue.drain()  # the last two were layers 0 and 1, which the ring believes in its slots
    num_slices = len(plan_layer_copies(rank.layout.layers[0], rank.dwdp_rank, SLICE_BYTES))
    return {"issue": statistics.median(times[2:]), "slices": num_slices}


# --- the table -----------------------------------------------------------------------------------


class Child:
    """A process that runs cases one after the other; what it prints comes line by line."""

    def __init__(self, names: list[str], options: argparse.Namespace) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--in-process", *names]
        command += ["--rounds", str(options.rounds)]
        if options.tokens:
            command += ["--tokens", *map(str, options.tokens)]
        if options.torch_kernel:
            command.append("--torch-kernel")
        if options.profile:
            command += ["--profile", str(options.profile.resolve())]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip())
        self.lines.put(None)

    def end(self) -> None:
        """Whatever it does."""
        self.process.kill()
        self.process.wait()


def run_together(
    names: list[str], options: argparse.Namespace, deadline: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of cases that share a child, until one fails or hangs; and the cases to go on with."""
    rows: list[dict[str, Any]] = []
    left, running, said = list(names), names[0], [""]
    started = time.monotonic()
    child = Child(names, options)
    try:
        while True:
            timeout_s = min(CASE_S, max(0.1, deadline - time.monotonic()))
            line = child.lines.get(timeout=timeout_s)
            if line is None:
                break
            if line.startswith('{"case"'):
                rows.append(json.loads(line))
            elif line.startswith("begin "):
                running, said, started = line.removeprefix("begin "), [""], time.monotonic()
            elif line.startswith("end "):
                left.remove(running)
                print(f"{running}: {time.monotonic() - started:.0f} s", flush=True)
            else:
                said.append(line)
        code = child.process.wait()
    except queue.Empty:
        code, said = -1, [*said, "said nothing more in time"]
    finally:
        child.end()
    if code and running in left:
        left.remove(running)
        print(f"{running}: FAILED")
        print("\n".join(f"    | {line[:300]}" for line in said[-8:]), flush=True)
    return rows, left


def print_issue_times(rows: list[dict[str, Any]]) -> None:
    """Of the host, beside the table's: what a layer's copies cost to enqueue."""
    print(f"\n{'issue of one layer':<26}{'2 MiB slices':>13}{'us':>8}{'us per slice':>14}")
    for row in {row["case"]: row for row in rows}.values():
        us, slices = row["host_us"]["issue"], row["host_us"]["slices"]
        print(f"{row['case']:<26}{slices:>13}{us:>8.1f}{us / max(1, slices):>14.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = all_cases()
    parser.add_argument("--cases", nargs="+", choices=cases, default=None, metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=int, help="instead of each case's own")
    parser.add_argument("--rounds", type=int, default=1 if SIMULATED else 5)
    parser.add_argument("--budget-s", type=float, default=285, help="no case starts after this")
    parser.add_argument("--torch-kernel", action="store_true", help="not vLLM's, even if it works")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--profile", type=Path, help="folder for traces of piecewise prefetch")
    parser.add_argument("--in-process", nargs="+", choices=cases, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        return run_in_process(options)
    started = time.monotonic()
    # The ones that matter most first: the time may not suffice for all.
    order = options.cases or sorted(cases, key=lambda name: not name.endswith("host"))
    rows: list[dict[str, Any]] = []
    deadline = started + options.budget_s
    while order and time.monotonic() < deadline - 15:
        more, order = run_together(order, options, deadline)
        rows += more
    print_table(rows)
    print_issue_times(rows)
    broken = broken_promises(rows)
    for line in broken:
        print(f"BROKEN: {line}")
    if order:
        print(f"not run, the budget of {options.budget_s:.0f} s was spent: {', '.join(order)}")
    target = options.json or Path(os.environ.get("OUT", "/tmp"), "bench_gpu.json")
    target.write_text(json.dumps({"rows": rows, "broken": broken, "left_out": order}, indent=1))
    print(f"everything with spreads: {target}")
    return 1 if broken or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

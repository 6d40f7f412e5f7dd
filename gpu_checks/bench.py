"""What prefetching experts costs on one GPU beside having them all, and beside other ways to fetch them.

    python -m gpu_checks --only bench --budget-s 285
    python -m gpu_checks --only steps:qwen3-30b-a3b-bf16 --tokens 64 8192

A rank's shard, views, ring and copy queue are the product's; a step is `NUM_LAYERS` layers of a
fused-MoE kernel and dense products in the place of attention. Compared, in interleaved rounds within
one process, always in the same mode (eager, a graph per layer, one graph):

    resident   all experts in the device's memory, one composite tensor, no ring
    prefetch   our ring: copies of layer l+2 while layers l+1 ... compute
    merge      our ring, then own and fetched experts copied together into one torch tensor
    join       copies of layer l+1 inside the graph of layer l, which ends when they do (what vLLM's
               offloader does in piecewise graphs)
    gather     a Triton kernel copies just the routed remote experts (gpu_checks/expert_gather.py)

READ THIS BEFORE THE NUMBERS. There is one GPU, so the peers are on it too. Copies within a device run
on its multiprocessors and share its memory's bandwidth with the kernels: prefetch looks worse than
over NVLink. In the `host` cases the peers' experts lie in pinned host memory and a real copy engine
moves them, beside the kernels as over NVLink, but at the speed of PCIe; these decide whether the ring
hides copies. And "in place" reads here are of own memory, so `resident` is also direct mode at its best.

Never run on a GPU so far (docs/gpu.md); over the fake driver it runs with toy shapes, and its numbers
there mean nothing.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from gpu_checks.accelerator import Accelerator, accelerator
from gpu_checks.asking import emit_row
from gpu_checks.bench_cases import MODES, NUM_LAYERS, all_cases
from gpu_checks.bench_model import WAYS, Model
from gpu_checks.bench_table import broken_promises
from gpu_checks.expert_ranks import (
    RankMemory,
    local_ranks,
    only_ring,
    peers_on_host,
    same_bytes,
)
from gpu_checks.moe_kernels import choose_kernel, grouped_moe
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.model_executor import ops
from vllm_dwdp.model_executor.rings import PrefetchRings
from vllm_dwdp.prefetch.copy_plan import plan_layer_copies

STEPS_PER_ROUND = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says about benchmarks.

    Args:
        tokens: instead of each case's own.
        rounds: of each measurement, by default 5, and 1 where there is no GPU.
        torch_kernel: not vLLM's, even if it works.
        profile: a folder for traces of piecewise prefetch.
    """

    tokens: list[int] | None = None
    rounds: int | None = None
    torch_kernel: bool = False
    profile: str | None = None

    @classmethod
    def of_process(cls) -> Self:
        """Read the options that the parent passed on."""
        return cls(**json.loads(os.environ.get("GPU_CHECKS_BENCH", "{}")))


def steps(name: str) -> str:
    """Measure one case, and hand on a row per number of tokens."""
    gpu, options = accelerator(), Options.of_process()
    case = all_cases(toy=not gpu.is_real)[name]
    rounds = options.rounds or (5 if gpu.is_real else 1)
    kernel_name, kernel = choose_kernel(case.shape.num_experts, case.shape.dtype, gpu.device)
    if options.torch_kernel:
        kernel_name, kernel = "torch grouped_mm, as asked", grouped_moe
    memory = gpu.open_memory()
    rows = []
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
        mapper, rings = rank.mapper(peers), rank.rings(peers)
        common = {
            "case": name,
            "kernel": kernel_name,
            "device": gpu.describe(),
            "copies": copies_against_plain(gpu, rank, rings, on_host=case.on_host),
            "host_us": host_us(gpu, rings) | issue_us(rank, rings),
        }
        for num_tokens in options.tokens or case.tokens:
            model = Model(gpu, rank, mapper, rings, direct, kernel, num_tokens)
            rows.append(common | {"tokens": num_tokens} | measure_steps(model, rounds))
            emit_row(rows[-1])
            if options.profile and gpu.is_real:
                trace = f"{name}-{num_tokens}.json.gz".replace("/", "-")
                step = model.make_step("prefetch", "piecewise")
                write_profile(model, step, Path(options.profile, trace))
            model.close()
            del model
        gpu.synchronize()
        rings.queue.drain()
    memory.close()
    gpu.release_memory()
    broken = broken_promises(rows)
    assert not broken, f"BROKEN: {'; '.join(broken)}"
    ratios = [f"{row['ratios']['prefetch piecewise']:.3f} at {row['tokens']}" for row in rows]
    return f"prefetch over resident, piecewise: {', '.join(ratios)} tokens; {kernel_name}"


def write_profile(model: Model, step: Callable[[], None], target: Path) -> None:
    """Write a trace of two steps, to look at what overlaps: nothing should join within a graph."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    model.gpu.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        step()
        model.gpu.synchronize()
    target.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(target))


def measure_steps(model: Model, rounds: int) -> dict[str, Any]:
    """Measure a step by way and mode; each round runs all of them once."""
    steps: dict[str, Callable[[], None]] = {}
    for way, modes in WAYS.items():
        for mode in modes:
            if way != "gather" or model.gathers:
                steps[f"{way} {mode}"] = model.make_step(way, mode)
    model.gpu.synchronize()
    model.rings.queue.drain()
    # The ring must give what resident weights give; checked before `join` and `gather`, which use
    # its slots without its schedule, and after making the steps, which did so too.
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
    """Measure the steady state: the step before the clock starts leaves its copies under way."""
    model.gpu.synchronize()
    step()

    def round_of_steps() -> None:
        for _ in range(STEPS_PER_ROUND):
            step()

    return model.gpu.milliseconds(round_of_steps) / STEPS_PER_ROUND


def moe_milliseconds(model: Model) -> float:
    """Measure the expert kernels of one layer alone, on resident weights."""
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
) -> dict[str, Any]:
    """Measure, in turns, one layer's fill and one torch copy of as many bytes."""
    ring, queue = only_ring(rings), rings.queue
    num_bytes = sum(ring.layer_bytes(0).values())
    target = torch.empty(num_bytes, dtype=torch.uint8, device=gpu.device)
    if on_host:
        source = gpu.pinned(num_bytes)
    else:
        source = torch.empty(num_bytes, dtype=torch.uint8, device=gpu.device)
    source.fill_(1)

    def fill() -> None:
        queue.issue(ring.batches[0], None)
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
    # Layer 0's slot now holds layer 0 whatever its schedule says: it is the first layer of a step.
    reads = read_gbps(gpu, rank)
    return {
        "how": queue.describe(),
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
    """Measure how fast a reduction reads a peer's shard where it is."""
    peer = next(iter(rank.peers.values()))
    num_bytes = min(2**30, rank.layout.shard_bytes(next(iter(rank.peers))))
    words = tensor_at(peer.address, torch.int32, (num_bytes // 4,), gpu.device)
    words.amax()
    return num_bytes / 1e6 / statistics.median(gpu.milliseconds(words.amax) for _ in range(5))


def host_us(gpu: Accelerator, rings: PrefetchRings) -> dict[str, float]:
    """Measure the host per layer: wait and record eagerly, and what a ring adds to a replay."""
    tick = torch.zeros(1, device=gpu.device)

    def layer(number: int) -> None:
        ops.wait_layer(tick, 0, number)
        tick.add_(1)
        ops.record_layer(tick, 0, number)

    for number in range(NUM_LAYERS):
        layer(number)
    gpu.synchronize()
    pieces = [gpu.capture(partial(layer, number)) for number in range(NUM_LAYERS)]
    plain = gpu.capture(lambda: tick.add_(1))

    def wait_and_record(number: int) -> None:
        ops.wait_layer(tick, 0, number)
        ops.record_layer(tick, 0, number)

    actions: dict[str, Callable[[int], None]] = {
        "eager": wait_and_record,
        "ring": lambda number: pieces[number](),
        "bare": lambda number: plain(),
    }
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(20):
        for name, action in actions.items():
            gpu.synchronize()
            rings.queue.drain()
            started = time.perf_counter()
            for number in range(NUM_LAYERS):
                action(number)
            found[name].append((time.perf_counter() - started) / NUM_LAYERS * 1e6)
    gpu.synchronize()
    bare = statistics.median(found["bare"])
    return {
        "wait_and_record": statistics.median(found["eager"]),
        "added_to_a_replay": statistics.median(found["ring"]) - bare,
        "replay_alone": bare,
    }


def issue_us(rank: RankMemory, rings: PrefetchRings) -> dict[str, float]:
    """Measure the host's `issue` of one layer's real slices, which every layer costs.

    The copy stream is idle each time, as in a step whose copies are hidden.
    """
    ring, queue = only_ring(rings), rings.queue
    times = []
    for number in range(5 * NUM_LAYERS + 2):
        queue.drain()
        started = time.perf_counter()
        queue.issue(ring.batches[number % NUM_LAYERS], None)
        times.append((time.perf_counter() - started) * 1e6)
    queue.drain()  # layers 0 and 1 came last, as the schedule has it
    plan = plan_layer_copies(rank.layout.layers[0], rank.dwdp_rank, queue.slice_bytes)
    return {"issue": statistics.median(times[2:]), "slices": sum(map(len, plan))}

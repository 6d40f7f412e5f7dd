"""Questions about what copies cost the host: enqueued behind a busy stream, and as nodes of graphs.

Each function that `gpu_checks.questions` names is one question: it returns what it found. What would
follow from the numbers is decided here as well, by limits that were set before anything was measured;
neither a thread that issues copies nor graphs without them is built before one of them is passed.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from gpu_checks.accelerator import Accelerator, accelerator
from gpu_checks.compute_stream import ComputeStream
from gpu_checks.driver_memory import PAGE, mapped
from vllm_dwdp.device.cuda_copies import CudaCopyQueue
from vllm_dwdp.device.cuda_driver import CudaDevice
from vllm_dwdp.device.queue import Waves

FILL_US = 7_400
"""A layer of DeepSeek-R1 in NVFP4 on four GB200, at 643 GB/s."""
BLOCKED_SHARE = 0.1
"""Of a fill: with more of it lost to the host, a thread of its own would have to issue copies."""
PLANNED_COPIES, PLANNED_NODES = 300, 1_000
"""The most that plans make of DeepSeek-R1: slices of a layer, nodes of a full graph."""
LAUNCH_LIMIT_US = 1_000
"""A tenth of a decode step of 10 ms."""
GRAPH_LIMIT_MIB = 20
"""Fifty graphs of this size take a GiB of the KV cache."""

SPIN_US = 50_000
COPY_BYTES = 4096
NUM_PEERS = 3


@dataclass(frozen=True, kw_only=True)
class IssueTimes:
    """Microseconds of the host in `issue`: on an idle stream, behind a spin, and three behind it."""

    idle: float
    behind: float
    three: float


def issue_blocked() -> str:
    """Time `issue` behind a kernel that spins, by number of copies: in waves, and in one call."""
    gpu = accelerator()
    counts = (12, PLANNED_COPIES, 2268, 4704) if gpu.is_real else (12, 60)
    in_waves: dict[int, IssueTimes] = {}
    said = []
    with ExitStack() as stack:
        stack.callback(gpu.open_memory().close)
        stack.enter_context(gpu.on_stream())
        device = stack.enter_context(CudaDevice(0))
        size = -(-2 * counts[-1] * COPY_BYTES // PAGE) * PAGE
        address, _handles = stack.enter_context(mapped(device, size))
        for count in counts:
            for way, per_wave in (("waves of three", NUM_PEERS), ("one call", count)):
                waves = spread_copies(address, count, per_wave, gap=0)
                times = _issue_times(gpu, device, waves)
                said.append(
                    f"{count} copies in {way}: {times.idle:.0f} us idle, {times.behind:.0f} behind a "
                    f"spin of {SPIN_US // 1000} ms, {times.three:.0f} for three fills behind it"
                )
                if way == "waves of three":
                    in_waves[count] = times
    return f"{judge_issue(in_waves)}; {'; '.join(said)}"


def judge_issue(times: Mapping[int, IssueTimes]) -> str:
    """Say whether the host is held up so long that another thread would have to issue copies."""
    largest = max(count for count in times if count <= PLANNED_COPIES)
    share = times[largest].behind / FILL_US
    verdict = "AN ISSUING THREAD IS WORTH BUILDING" if share > BLOCKED_SHARE else "nothing to build"
    return (
        f"{verdict}: {largest} copies hold the host for {times[largest].behind:.0f} us, "
        f"{share:.0%} of a fill of {FILL_US / 1000:g} ms (limit {BLOCKED_SHARE:.0%})"
    )


def spread_copies(address: int, count: int, per_wave: int, *, gap: int) -> Waves:
    """Make `count` small copies from the second half of a range to its first, `gap` bytes apart."""
    step = COPY_BYTES + gap
    copies = [
        (address + number * step, address + (count + number) * step, COPY_BYTES)
        for number in range(count)
    ]
    return [copies[start : start + per_wave] for start in range(0, count, per_wave)]


def _issue_times(gpu: Accelerator, device: CudaDevice, waves: Waves) -> IssueTimes:
    rounds = 5 if gpu.is_real else 1
    idle: list[float] = []
    behind: list[float] = []
    three: list[float] = []
    with CudaCopyQueue(device) as queue:
        batches = [queue.add_batch(waves) for _ in range(3)]
        for _ in range(rounds):
            gpu.synchronize()
            queue.drain()
            idle.append(_microseconds(lambda: queue.issue(batches[0], None)))
            queue.drain()
            for found, fills in ((behind, batches[:1]), (three, batches)):
                gpu.pause(SPIN_US)
                for batch in fills:
                    queue.record(batch, gpu.current_stream())

                def issue(fills: Sequence[int] = fills) -> None:
                    for batch in fills:
                        queue.issue(batch, batch)

                found.append(_microseconds(issue))
                gpu.synchronize()
                queue.drain()
    return IssueTimes(
        idle=statistics.median(idle),
        behind=statistics.median(behind),
        three=statistics.median(three),
    )


@dataclass(frozen=True, kw_only=True)
class GraphCosts:
    """What a graph of copies costs: to capture and instantiate, to keep, and the host to launch."""

    capture_s: float
    mib: float
    launch_us: float


def capture_nodes() -> str:
    """Capture fills of more and more copies that cannot be merged, and launch each."""
    gpu = accelerator()
    counts = (1, 100, PLANNED_NODES, 10_000, 127_000) if gpu.is_real else (1, 10, 50)
    costs: dict[int, GraphCosts] = {}
    with CudaDevice(0) as device:
        size = -(-4 * counts[-1] * COPY_BYTES // PAGE) * PAGE
        with mapped(device, size) as (address, _handles):
            for count in counts:
                waves = spread_copies(address, count, NUM_PEERS, gap=COPY_BYTES)
                costs[count] = _graph_costs(device, waves)
    said = [
        f"{count} nodes: captured in {each.capture_s:.3f} s, {each.mib:.1f} MiB, launched in "
        f"{each.launch_us:.0f} us"
        for count, each in costs.items()
    ]
    return f"{judge_graphs(costs)}; {'; '.join(said)}"


def judge_graphs(costs: Mapping[int, GraphCosts]) -> str:
    """Say whether copies inside of graphs cost so much that graphs would have to do without them."""
    largest = max(count for count in costs if count <= PLANNED_NODES)
    each = costs[largest]
    passed = each.launch_us > LAUNCH_LIMIT_US or each.mib > GRAPH_LIMIT_MIB
    verdict = "GRAPHS WITHOUT COPIES ARE WORTH BUILDING" if passed else "nothing to build"
    return (
        f"{verdict}: a graph of {largest} copies takes {each.launch_us:.0f} us to launch (limit "
        f"{LAUNCH_LIMIT_US}) and {each.mib:.1f} MiB (limit {GRAPH_LIMIT_MIB})"
    )


def _graph_costs(device: CudaDevice, waves: Waves) -> GraphCosts:
    with CudaCopyQueue(device) as queue, ComputeStream() as stream:
        batch = queue.add_batch(waves)
        free_before = device.free_bytes
        started = time.perf_counter()
        stream.begin_capture()
        queue.capture_record(batch, stream.handle)
        queue.capture_fill(batch, batch, stream.handle)
        graph = stream.end_capture()
        capture_s = time.perf_counter() - started
        launches = []
        for _ in range(6):  # the first uploads the graph
            launches.append(_microseconds(lambda: graph.launch(stream)))
            stream.synchronize()
        taken = free_before - device.free_bytes
        graph.close()
    return GraphCosts(
        capture_s=capture_s, mib=taken / 2**20, launch_us=statistics.median(launches[1:])
    )


def _microseconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e6

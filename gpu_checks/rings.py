"""Questions about the order of copies and kernels in the product's rings.

Each function that `gpu_checks.questions` names is one question: it returns what it found, and fails by
an exception.
"""

import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from gpu_checks.accelerator import accelerator
from gpu_checks.expert_ranks import ExpertShape, only_ring, peers_on_host
from gpu_checks.ring_check import RingCheck, provoke_races, without_records, without_waits
from gpu_checks.views import NUM_LAYERS, SHAPE, group
from vllm_dwdp.compat.worker import cuda_graphs
from vllm_dwdp.model_executor import ops
from vllm_dwdp.model_executor.rings import PrefetchRings
from vllm_dwdp.prefetch.captured_ring import RingGraph

LARGE = ExpertShape(num_experts=8, hidden_size=2048, intermediate_size=2048, top_k=2)


def races(mode: str) -> str:
    """Run with late copies, slow kernels and poisoned slots; then without the events."""
    gpu = accelerator()
    provoke_races(3000 if gpu.is_real else 200_000)
    controls = []
    for break_ring in (None, without_waits, without_records):
        with group(gpu) as ranks, gpu.on_stream():
            check = RingCheck(gpu, ranks[0])
            if break_ring is not None:
                break_ring(check.rings)
            wrong = check.wrong_layers(check.make_step(mode), 8 if gpu.is_real else 2)
            check.quiet()
            if break_ring is None:
                assert not wrong, f"wrong layers {wrong}"
                assert check.rings.counters()[0].fills > NUM_LAYERS, "nothing was fetched"
                continue
            controls.append(f"{break_ring.__name__} {wrong}")
            # A simulated kernel has returned before its slot can be refilled, recorded or not.
            if break_ring is without_waits or gpu.is_real:
                assert wrong, f"A CONTROL SAW NOTHING WRONG, so this proves nothing: {controls}"
    return f"every layer is right; controls, wrong layers: {', '.join(controls)}"


def mixed_modes(seed: str) -> str:
    """Mix eager, piecewise and full steps and forwards cut short, back to back."""
    gpu = accelerator()
    provoke_races(1500)
    dice = random.Random(int(seed))
    with group(gpu) as ranks, gpu.on_stream():
        check = RingCheck(gpu, ranks[0])
        steps: list[Callable[[], object]] = [
            check.make_step(mode) for mode in ("eager", "piecewise", "full")
        ]
        for _ in range(25 if gpu.is_real else 4):
            check.rings.begin_forward()
            for _ in range(dice.randrange(4)):
                if dice.random() < 0.4:  # aborted: the layers after it never run
                    check.run(range(dice.randrange(1, NUM_LAYERS)))
                    check.rings.begin_forward()
                else:
                    dice.choice(steps)()
            check.forget()
            dice.choice(steps)()
            wrong = check.compare()
            assert not wrong, f"wrong layers {wrong}"
        check.quiet()
    return "every layer is right"


def graph_seam() -> str:
    """Write down what a follower of torch's graphs is told."""
    gpu = accelerator()
    told: list[str] = []

    class Follower:
        """Writes down what it is told."""

        def begin_capture(self) -> None:
            """Note that a capture begins."""
            told.append("begin")

        def end_capture(self) -> RingGraph:
            """Note that a capture ends."""
            told.append("end")
            return RingGraph(needs=[0])

        def before_launch(self, graph: RingGraph) -> None:
            """Note that a replay begins."""
            told.append("before")

        def after_launch(self, graph: RingGraph) -> None:
            """Note that a replay was enqueued."""
            told.append("after")

    x = torch.zeros(4, device=gpu.device)
    with cuda_graphs.followed_by([Follower()]):
        replay = gpu.capture(lambda: x.add_(1))
        replay()
        replay()
    gpu.synchronize()
    said = f"told {' '.join(told)}; the graph ran {x[0].item():g} times"
    assert told == ["begin", "end", "before", "after", "before", "after"], said
    assert x.tolist() == [2.0] * 4, said
    return said


def no_join() -> str:
    """Time pieces while the layers of later ones are being copied."""
    gpu = accelerator()
    with group(gpu, shape=LARGE if gpu.is_real else SHAPE) as ranks, gpu.on_stream():
        rank = ranks[0]
        rings = rank.rings(peers_on_host(rank, gpu.pinned))
        x = torch.zeros(1, device=gpu.device)

        def layer(index: int) -> None:
            ops.wait_layer(x, 0, index)
            gpu.pause(20)
            ops.record_layer(x, 0, index)

        layer(0)
        layer(1)
        pieces = [gpu.capture(partial(layer, index)) for index in range(NUM_LAYERS)]
        shares = []
        for _ in range(8 if gpu.is_real else 2):
            rings.begin_forward()
            rings.queue.drain()
            gpu.synchronize()
            ours = gpu.milliseconds(lambda: [pieces[index]() for index in (0, 1)])
            shares.append((ours, gpu.milliseconds(lambda: [pieces[n]() for n in range(2, 6)])))
        copy_ms = milliseconds_of_fill(rings)
    ours, later = (statistics.median(column) for column in zip(*shares, strict=True))
    said = f"pieces 0 and 1 took {ours:.2f} ms, pieces 2 to 5 {later:.2f} ms, one fill {copy_ms:.2f} ms"
    assert ours < copy_ms / 2 or not gpu.is_real, said
    return said


def milliseconds_of_fill(rings: PrefetchRings) -> float:
    """Measure layer 0's copies by the host's clock."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        rings.queue.issue(only_ring(rings).batches[0], None)
        rings.queue.drain()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)

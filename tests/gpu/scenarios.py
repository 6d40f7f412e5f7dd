"""Scenarios on one GPU, each a process: `python -m tests.gpu.scenarios NAME [ARGUMENT]`.

A scenario fails by an exception. None has run on a GPU yet; over the fake driver they run as programs
(`test_simulated.py`), which says nothing about hardware.
"""

import contextlib
import faulthandler
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gpu_checks.accelerator import Accelerator, accelerator
from gpu_checks.expert_ranks import (
    ExpertShape,
    RankMemory,
    local_ranks,
    same_bytes,
    wrong_weights,
)
from gpu_checks.moe_kernels import Routing, choose_kernel
from gpu_checks.ring_check import (
    RingCheck,
    provoke_races,
    without_records,
    without_waits,
)
from tests.gpu.processes import Rank
from vllm_dwdp.device.base import Handles
from vllm_dwdp.device.cuda import CudaMemory
from vllm_dwdp.model_executor import ops
from vllm_dwdp.model_executor.measure import measure_costs

# Experts of 0.69 and 0.34 MiB: many end within a page of 2 MiB, and none on its end.
SHAPE = ExpertShape(num_experts=7, hidden_size=256, intermediate_size=704, top_k=2)
# Enough pages that some are remote also where ranks keep more than their share.
WIDE = ExpertShape(num_experts=13, hidden_size=512, intermediate_size=704, top_k=2)
NUM_LAYERS = 6


@contextlib.contextmanager
def group(
    gpu: Accelerator,
    size: int,
    num_layers: int = NUM_LAYERS,
    experts_per_rank: int | None = None,
    shape: ExpertShape = SHAPE,
) -> Iterator[list[RankMemory]]:
    """All ranks of a group in this process."""
    memory = gpu.open_memory()
    try:
        with local_ranks(memory, shape, num_layers, size, experts_per_rank) as ranks:
            yield ranks
    finally:
        memory.close()


# --- weights -------------------------------------------------------------------------------------


def views(argument: str) -> None:
    """Both views equal `torch.cat` bit by bit, on every rank, with and without redundancy."""
    size, _, per_rank = argument.partition("/")
    gpu = accelerator()
    provoke_races(500)
    per_rank_or_even = int(per_rank) if per_rank else None
    with group(gpu, int(size), 3, per_rank_or_even, WIDE) as ranks:
        whole = [ranks[0].whole(layer) for layer in range(3)]
        for rank in ranks:
            direct, rings = rank.direct_views(), rank.rings()
            tick = torch.zeros(1, device=gpu.device)
            for step in range(2):
                for layer in range(3):
                    expected = whole[layer]
                    assert not wrong_weights(direct[layer], expected), (rank.dwdp_rank, layer)
                    ops.wait_layer(tick, 0, layer)
                    wrong = wrong_weights(rings.views[layer], expected)
                    ops.record_layer(tick, 0, layer)
                    assert not wrong, (rank.dwdp_rank, step, layer, wrong)
            fetched = rings.counters()[0].fetched_bytes
            assert fetched and set(fetched) <= set(rank.peers) and all(fetched.values()), fetched
            gpu.synchronize()
            rings.queue.drain()


def writable_peers(_: str) -> None:
    """Views over peers that are mapped writable, as where a driver maps nothing read-only."""
    gpu = accelerator()
    memory: CudaMemory = gpu.open_memory()
    memory.memory._read_only_works = False
    try:
        with local_ranks(memory, SHAPE, 2, 3) as ranks:
            for rank in ranks:
                for layer, view in enumerate(rank.direct_views()):
                    assert not wrong_weights(view, rank.whole(layer)), (rank.dwdp_rank, layer)
    finally:
        memory.close()


def adoption(_: str) -> None:
    """A shard is adopted from descriptors after its rank is gone, and is the same memory."""
    gpu = accelerator()
    memory: CudaMemory = gpu.open_memory()
    try:
        with local_ranks(memory, SHAPE, 2, 2) as ranks:
            first = ranks[0]
            digest = first.shard.memory.digest()
            handles = first.shard.memory.export()
            assert handles.num_bytes == first.handle_bytes(0)
            pieces = first.layout.piece_bytes(0)
        adopted = memory.adopt_shard(handles)
        assert adopted.is_adopted and adopted.digest() == digest
        mapping = adopted.append(pieces)
        adopted.seal()
        assert mapping.num_bytes == sum(pieces)
        adopted.close()
    finally:
        memory.close()


def moe_outputs(mode: str) -> None:
    """A layer's output through the ring, and in place, equals the one from full weights in bits."""
    gpu = accelerator()
    name, kernel = choose_kernel(SHAPE.num_experts, SHAPE.dtype, gpu.device)
    print(f"kernel: {name}")
    provoke_races(1000)
    with group(gpu, 2) as ranks, torch.no_grad(), gpu.on_stream():
        rank = ranks[0]
        direct, rings = rank.direct_views(), rank.rings()
        routing = Routing.random(33, SHAPE.num_experts, SHAPE.top_k, gpu.device)
        x = torch.randn(33, SHAPE.hidden_size, device=gpu.device).to(torch.bfloat16)
        route = (routing.topk_weights, routing.topk_ids)
        outputs = [torch.zeros_like(x) for _ in range(NUM_LAYERS)]

        def layers(numbers: range) -> None:
            for layer in numbers:
                tensors = rings.views[layer].tensors
                ops.wait_layer(x, 0, layer)
                result = kernel(x, tensors["w13_weight"], tensors["w2_weight"], *route)
                outputs[layer].copy_(result)
                ops.record_layer(x, 0, layer)

        layers(range(NUM_LAYERS))
        gpu.synchronize()
        size = {"eager": 0, "piecewise": 1, "full": NUM_LAYERS}[mode]
        starts = range(0, NUM_LAYERS, size) if size else ()
        replays = [gpu.capture(lambda a=a: layers(range(a, a + size))) for a in starts]
        for _ in range(4):
            for output in outputs:
                output.fill_(float("nan"))
            for replay in replays or [lambda: layers(range(NUM_LAYERS))]:
                replay()
        gpu.synchronize()
        for layer in range(NUM_LAYERS):
            whole = rank.whole(layer)
            expected = kernel(x, whole["w13_weight"], whole["w2_weight"], *route)
            tensors = direct[layer].tensors
            in_place = kernel(x, tensors["w13_weight"], tensors["w2_weight"], *route)
            assert expected.isfinite().all() and expected.abs().sum() > 0
            assert same_bytes(outputs[layer], expected), f"layer {layer} through the ring"
            assert same_bytes(in_place, expected), f"layer {layer} in place"
        gpu.synchronize()
        rings.queue.drain()


# --- races ---------------------------------------------------------------------------------------


def races(mode: str) -> None:
    """No delay lets kernels see poison; and without waits, or without records, they do."""
    gpu = accelerator()
    provoke_races(3000 if gpu.is_real else 60000)
    for break_ring in (None, without_waits, without_records):
        with group(gpu, 3) as ranks, gpu.on_stream():
            check = RingCheck(gpu, ranks[0])
            if break_ring is not None:
                break_ring(check.rings)
            wrong = check.wrong_layers(check.make_step(mode), 2 if not gpu.is_real else 8)
            check.quiet()
            if break_ring is None:
                assert not wrong, wrong
                assert check.rings.counters()[0].fills > NUM_LAYERS
            elif break_ring is without_waits or gpu.is_real:
                assert wrong, f"{mode} {break_ring.__name__}: a broken ring showed nothing"


def mixed_modes(seed: str) -> None:
    """Eager, piecewise and full steps and forwards cut short, in any order, back to back."""
    gpu = accelerator()
    provoke_races(1500)
    dice = random.Random(int(seed))
    with group(gpu, 3) as ranks, gpu.on_stream():
        check = RingCheck(gpu, ranks[0])
        steps: list[Callable[[], object]] = [
            check.make_step(mode) for mode in ("eager", "piecewise", "full")
        ]
        for _ in range(4 if not gpu.is_real else 25):
            check.rings.begin_forward()
            for _ in range(dice.randrange(4)):
                if dice.random() < 0.4:  # aborted: the layers after it never run
                    check.run(range(dice.randrange(1, NUM_LAYERS)))
                    check.rings.begin_forward()
                else:
                    dice.choice(steps)()
            check.forget()
            dice.choice(steps)()
            assert not check.compare()
        check.quiet()


# --- resources -----------------------------------------------------------------------------------


def leaks(_: str) -> None:
    """Device memory and descriptors after closing equal those before, graphs captured or not."""
    gpu = accelerator()
    measured = []
    probe = gpu.open_memory()
    for _round in range(4):
        with group(gpu, 2) as ranks, gpu.on_stream():
            check = RingCheck(gpu, ranks[0])
            assert not check.wrong_layers(check.make_step("full"), 1)
            check.quiet()
            del check
        gpu.release_memory()
        measured.append((probe.device.free_bytes, len(os.listdir("/proc/self/fd"))))
    granule = probe.page_bytes
    probe.close()
    (free, files), (free_later, files_later) = measured[1], measured[-1]
    assert abs(free - free_later) <= granule, measured
    assert files == files_later, measured


def failed_set_up(_: str) -> None:
    """A set-up that fails half-way (descriptors that are none) gives everything back."""
    gpu = accelerator()
    memory = gpu.open_memory()
    free = memory.device.free_bytes
    files = len(os.listdir("/proc/self/fd"))
    reader, writer = os.pipe()
    try:
        handles = Handles(fds=(reader, writer), num_bytes=(memory.page_bytes,) * 2)
        memory.open_peer(handles)
    except Exception as error:
        print(f"refused as it must be: {error}")
    else:
        raise AssertionError("a pipe was imported as device memory")
    handles.close()
    assert len(os.listdir("/proc/self/fd")) == files
    assert abs(memory.device.free_bytes - free) <= memory.page_bytes
    memory.close()


def costs(_: str) -> None:
    """What the start measures is a speed that memory can have."""
    gpu = accelerator()
    with group(gpu, 2) as ranks:
        found = measure_costs(ranks[0].mapper(), ranks[0].rings(), 0, ranks[0].direct_views()[0])
    print(found)
    slowest, fastest = (1e6, 1e13) if not gpu.is_real else (1e8, 1e13)
    assert slowest < found.copy_bytes_per_s < fastest
    assert slowest < found.direct_bytes_per_s < fastest
    assert found.num_remote_experts == 3 and found.expert_bytes == SHAPE.expert_bytes
    assert found.other_seconds > 0 and found.direct_max_tokens >= 0


def gather(_: str) -> None:
    """The gather kernel fetches the routed remote experts, whole, and nothing else."""
    from tests.gpu.gather_check import check_gather

    check_gather()


# --- several processes ---------------------------------------------------------------------------


def ranks_meet(_: str) -> None:
    """Three processes meet through the real rendezvous, map each other, and read the same weights."""
    with contextlib.ExitStack() as stack:
        ranks = Rank.start_group(3, stack)
        for _round in range(2):
            for rank in ranks:
                rank.ask("check")
        for rank in ranks:
            rank.ask("close")
            assert rank.process.wait(timeout=60) == 0


def a_rank_is_killed(_: str) -> None:
    """kill -9 of an exporter: the survivors read its memory as before, in place and by copies."""
    with contextlib.ExitStack() as stack:
        ranks = Rank.start_group(3, stack)
        for rank in ranks:
            rank.ask("check")
        ranks[1].process.kill()
        ranks[1].process.wait()
        for rank in (ranks[0], ranks[2]):
            rank.ask("spend")  # take what the driver might have freed
            for _round in range(2):
                rank.ask("check")
            rank.ask("close")
            assert rank.process.wait(timeout=60) == 0


def reference(scenario: str) -> None:
    """What the fake driver assumes of a real one; if it fails, the fake is wrong somewhere."""
    from tests.unit.device import cuda_scenarios

    getattr(cuda_scenarios, scenario)()


def external_nodes(scenario: str) -> None:
    """As `reference`, of nodes that the product does not use: a fact, whatever it is."""
    reference(scenario)


# --- vLLM ----------------------------------------------------------------------------------------


def engines(mode: str) -> None:
    """Two vLLM ranks on one GPU give the tokens of one stock engine; see `tests.gpu.engines`."""
    from tests.gpu.engines import compare_engines

    compare_engines(mode)


def a_rank_returns(_: str) -> None:
    """A killed rank adopts its experts inside vLLM, without room for a second copy of them."""
    from tests.gpu.returning import kill_and_return

    kill_and_return()


def kv_sizing(_: str) -> None:
    """vLLM's KV cache leaves room for the shards and slots that torch knows nothing of."""
    from tests.gpu.kv_sizing import compare_sizes

    compare_sizes()


def dual_batch_overlap(_: str) -> None:
    """Refused by the front end, on the configuration that vLLM makes for this device."""
    import vllm_dwdp
    from tests.gpu.engines import make_model
    from vllm_dwdp.errors import DwdpUnsupportedError

    vllm_dwdp.register()
    from vllm import EngineArgs

    with tempfile.TemporaryDirectory() as folder:
        args = EngineArgs(
            model=str(make_model(Path(folder, "qwen3-moe"), num_hidden_layers=1)),
            distributed_executor_backend="dwdp",
            data_parallel_size=2,
            enable_dbo=True,
        )
        refusal = ""
        try:
            args.create_engine_config()
        except DwdpUnsupportedError as error:
            refusal = str(error)
        assert "--enable-dbo" in refusal, refusal or "dual-batch overlap was accepted"


SCENARIOS: dict[str, list[str]] = {
    "views": ["2", "3", "3/6"],
    "writable_peers": [""],
    "adoption": [""],
    "moe_outputs": ["piecewise", "full", "eager"],
    "races": ["full", "piecewise", "eager"],
    "mixed_modes": ["1", "2"],
    "leaks": [""],
    "failed_set_up": [""],
    "costs": [""],
    "gather": [""],
    "ranks_meet": [""],
    "a_rank_is_killed": [""],
    "reference": [
        "eager_steps_back_to_back",
        "eager_steps_never_see_poison",
        "exported_memory_outlives_its_exporter",
        "batch_copies_cannot_be_captured",
        "an_empty_batch_is_ready",
    ],
    "external_nodes": [
        "misuse_of_a_capture_is_an_error",
        "piecewise_graphs_with_copies_outside",
        "full_graph_with_copies_inside",
    ],
    "dual_batch_overlap": [""],
    "engines": ["eager", "full", "piecewise", "fp8", "full_v1", "default", "async", "drafter"],
    "a_rank_returns": [""],
    "kv_sizing": [""],
}
"""Every scenario with its arguments."""


def main() -> None:
    faulthandler.enable()
    name, argument = sys.argv[1], (sys.argv[2] if len(sys.argv) > 2 else "")
    globals()[name](argument)
    print("ok", flush=True)


if __name__ == "__main__":
    main()

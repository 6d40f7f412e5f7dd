"""Questions about expert memory without an engine: views, adoption, leaks, costs.

Each function that `gpu_checks.questions` names is one question: it returns what it found, and fails by
an exception.
"""

import contextlib
import os
import time
from collections.abc import Iterator

import torch

from gpu_checks.accelerator import Accelerator, accelerator
from gpu_checks.driver_memory import open_files
from gpu_checks.expert_ranks import (
    ExpertShape,
    RankMemory,
    local_ranks,
    wrong_weights,
)
from gpu_checks.ring_check import RingCheck, provoke_races
from vllm_dwdp.device.access import Access
from vllm_dwdp.device.base import Handles
from vllm_dwdp.device.cuda_driver import CudaDevice
from vllm_dwdp.device.digest import digest_host_memory
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.model_executor import ops
from vllm_dwdp.model_executor.costs import ServedModel, costs_from
from vllm_dwdp.model_executor.measure import measure_speeds
from vllm_dwdp.prefetch.mode_policy import MOST_DIRECT_TOKENS

# Experts of 0.69 and 0.34 MiB: many end within a page of 2 MiB, and none on its end.
SHAPE = ExpertShape(num_experts=7, hidden_size=256, intermediate_size=704, top_k=2)
# Enough pages that some are remote also where ranks keep more than their share.
WIDE = ExpertShape(num_experts=13, hidden_size=512, intermediate_size=704, top_k=2)
NUM_LAYERS = 6


@contextlib.contextmanager
def group(
    gpu: Accelerator,
    size: int = 3,
    num_layers: int = NUM_LAYERS,
    experts_per_rank: int | None = None,
    shape: ExpertShape = SHAPE,
) -> Iterator[list[RankMemory]]:
    """Make all ranks of a group in this process."""
    memory = gpu.open_memory()
    try:
        with local_ranks(memory, shape, num_layers, size, experts_per_rank) as ranks:
            yield ranks
    finally:
        memory.close()


# --- weights -------------------------------------------------------------------------------------


def views(argument: str) -> str:
    """Compare both views, twice around; `3/6` is three ranks with six experts each."""
    size, _, per_rank = argument.partition("/")
    gpu = accelerator()
    provoke_races(500)
    per_rank_or_even = int(per_rank) if per_rank else None
    num_fetched = 0
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
            num_fetched += sum(fetched.values())
            gpu.synchronize()
            rings.queue.drain()
    return f"every byte is right; {num_fetched / 2**20:.0f} MiB were fetched"


def check_writable_peers(gpu: Accelerator) -> None:
    """Check views over writable peers, as where a driver maps nothing read-only."""
    memory = gpu.open_memory()
    memory.memory.access.best = Access(writable=True, piecewise=False)
    try:
        with local_ranks(memory, SHAPE, 2, 3) as ranks:
            for rank in ranks:
                for layer, view in enumerate(rank.direct_views()):
                    assert not wrong_weights(view, rank.whole(layer)), (rank.dwdp_rank, layer)
    finally:
        memory.close()


def adoption() -> str:
    """Adopt a shard from descriptors after its rank is gone."""
    gpu = accelerator()
    memory = gpu.open_memory()
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
    return f"the same {sum(pieces)} bytes in {len(pieces)} pieces"


def digest() -> str:
    """Digest a shard on the device, and the bytes that the host reads of it."""
    gpu = accelerator()
    num_pages = 512 if gpu.is_real else 4
    memory = gpu.open_memory()
    try:
        shard = memory.new_shard("digest")
        num_bytes = num_pages * memory.page_bytes
        address = shard.append([num_bytes]).address
        words = tensor_at(address, torch.int64, (num_bytes // 8,), gpu.device)
        words.random_(-(2**63), 2**63 - 1)
        gpu.synchronize()
        on_host = words.cpu()
        expected = digest_host_memory(on_host.data_ptr(), num_bytes)
        shard.digest()  # warm-up
        started = time.perf_counter()
        assert shard.digest() == expected, "the device's arithmetic is not the host's"
        seconds = time.perf_counter() - started
        words[-1] ^= 1
        gpu.synchronize()
        assert shard.digest() != expected, "a flipped bit was not seen"
        shard.close()
    finally:
        memory.close()
    return f"the same, at {num_bytes / 1e9 / seconds:.1f} GB/s, mapping included"


# --- resources -----------------------------------------------------------------------------------


def leaks() -> str:
    """Make and close rings, graphs and both views four times."""
    gpu = accelerator()
    measured = []
    with CudaDevice(0) as probe:
        for _round in range(4):
            with group(gpu) as ranks, gpu.on_stream():
                check = RingCheck(gpu, ranks[0])
                ranks[0].direct_views()
                assert not check.wrong_layers(check.make_step("full"), 1)
                check.quiet()
                del check
            gpu.release_memory()
            measured.append((probe.free_bytes, open_files()))
        granule = probe.granularity_bytes
    (free, files), (free_later, files_later) = measured[1], measured[-1]
    assert abs(free - free_later) <= granule, measured
    assert files == files_later, measured
    return f"lost {free - free_later} bytes and {files_later - files} descriptors in 2 runs"


def failed_set_up() -> str:
    """Open a peer from descriptors that are no memory."""
    gpu = accelerator()
    memory = gpu.open_memory()
    free = memory.device.free_bytes
    files = open_files()
    reader, writer = os.pipe()
    handles = Handles(fds=(reader, writer), num_bytes=(memory.page_bytes,) * 2)
    try:
        memory.open_peer(handles)
    except Exception as error:
        said = str(error)
    else:
        raise AssertionError("a pipe was imported as device memory")
    handles.close()
    assert open_files() == files
    assert abs(memory.device.free_bytes - free) <= memory.page_bytes
    memory.close()
    return f"refused as it must be: {said}"


def costs() -> str:
    """Measure as a start does, and check that a device can be so fast."""
    gpu = accelerator()
    with group(gpu, 2) as ranks:
        rank = ranks[0]
        shard = (rank.peers[1].address, rank.layout.shard_bytes(1))
        speeds = measure_speeds(rank.device, {1: shard})
        found = costs_from(
            speeds,
            ServedModel(config={}, max_num_batched_tokens=8192, max_model_len=8192),
            group_size=2,
            num_experts=SHAPE.num_experts,
            num_resident=len(rank.placement.resident[0]),
            experts_per_token=SHAPE.top_k,
            remote_bytes=rank.layout.layers[0].remote_bytes(0),
        )
    slowest, fastest = (1e8, 1e13) if gpu.is_real else (1e6, 1e13)
    for speed in (
        speeds.copy_bytes_per_s,
        speeds.direct_bytes_per_s,
        speeds.memory_bytes_per_s,
        speeds.operations_per_s / 100,
    ):
        assert slowest < speed < fastest, speeds
    assert 0 <= found.direct_max_tokens <= MOST_DIRECT_TOKENS, found
    return (
        f"{speeds}; direct up to {found.direct_max_tokens} tokens (one device: peers are as near as "
        "own memory)"
    )

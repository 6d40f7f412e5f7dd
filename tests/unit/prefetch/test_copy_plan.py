"""The copy plan: every remote byte once, from a holder, in long runs, dealt into waves."""

from itertools import combinations
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.expert_shapes import layer_of, qwen3_30b, r1_fp8, r1_nvfp4
from tests.unit.strategies import models
from vllm_dwdp.device.cuda_queue import CudaQueue
from vllm_dwdp.device.host_queue import HostCopyQueue
from vllm_dwdp.layout.composite import WeightLayout
from vllm_dwdp.layout.model import LayerLayout, ModelLayout
from vllm_dwdp.layout.placement import Placement
from vllm_dwdp.layout.slots import SlotLayout
from vllm_dwdp.prefetch.copy_plan import (
    CopySlice,
    bytes_by_peer,
    plan_layer_copies,
    plan_layer_runs,
)

sizes_of_slices = st.just(0) | st.integers(7, 300)


def filled(copies: list[CopySlice]) -> dict[tuple[int, int], tuple[int, int]]:
    """Run copies byte by byte: (weight, byte of its tensor) -> (peer, offset in its shard)."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for copy in copies:
        assert copy.num_bytes > 0
        for step in range(copy.num_bytes):
            place = (copy.weight, copy.offset + step)
            assert place not in found, "a byte is copied twice"
            found[place] = (copy.peer_rank, copy.source_offset + step)
    return found


def follows(first: CopySlice, second: CopySlice) -> bool:
    """Whether `second` goes on where `first` ends, on both sides."""
    return (first.peer_rank, first.weight) == (second.peer_rank, second.weight) and (
        (first.offset + first.num_bytes, first.source_offset + first.num_bytes)
        == (second.offset, second.source_offset)
    )


def num_copies(layer: LayerLayout, rank: int, slice_bytes: int) -> int:
    return sum(map(len, plan_layer_copies(layer, rank, slice_bytes)))


@settings(max_examples=80, deadline=None)
@given(models(), sizes_of_slices)
def test_every_remote_byte_is_copied_once_from_where_its_holder_keeps_it(
    model: ModelLayout, slice_bytes: int
) -> None:
    for layer in model.layers:
        for rank in range(layer.group_size):
            expected = {}
            for index, part in layer.remote_parts(rank):
                weight = layer.weights[index]
                for byte in range(part.start, min(part.stop, weight.num_bytes)):
                    holder = weight.placement.source(byte // weight.expert_bytes, rank)
                    expected[index, byte] = (holder, layer.shard_offset(index, holder, byte))
            copies = [copy for wave in plan_layer_copies(layer, rank, slice_bytes) for copy in wave]
            assert filled(copies) == expected
            assert not slice_bytes or all(copy.num_bytes <= slice_bytes for copy in copies)
            assert all(copy.peer_rank != rank for copy in copies)


@settings(max_examples=80, deadline=None)
@given(models(), sizes_of_slices)
def test_runs_are_as_long_as_can_be_and_cut_into_no_more_slices_than_needed(
    model: ModelLayout, slice_bytes: int
) -> None:
    for layer in model.layers:
        for rank in range(layer.group_size):
            runs = list(plan_layer_runs(layer, rank))
            assert len(runs) <= (layer.group_size - 1) * len(layer.weights) * 2, "two parts at most"
            pairs = combinations(runs, 2)
            assert not any(follows(one, other) or follows(other, one) for one, other in pairs)
            allowed = sum(ceil(run.num_bytes / (slice_bytes or run.num_bytes)) for run in runs)
            assert num_copies(layer, rank, slice_bytes) == allowed


@settings(max_examples=80, deadline=None)
@given(models(), sizes_of_slices)
def test_a_wave_reads_no_peer_twice_and_every_peer_is_read_all_along(
    model: ModelLayout, slice_bytes: int
) -> None:
    for layer in model.layers:
        for rank in range(layer.group_size):
            waves = plan_layer_copies(layer, rank, slice_bytes)
            totals: dict[int, int] = {}
            for wave in waves:
                distances = [(copy.peer_rank - rank) % layer.group_size for copy in wave]
                assert distances == sorted(set(distances)), "one of each peer, the next rank first"
                for copy in wave:
                    totals[copy.peer_rank] = totals.get(copy.peer_rank, 0) + 1
            seen = dict.fromkeys(totals, 0)
            for number, wave in enumerate(waves, 1):
                for copy in wave:
                    seen[copy.peer_rank] += 1
                for peer, total in totals.items():
                    assert abs(seen[peer] - number / len(waves) * total) <= 1, "not evenly spread"


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_at_any_place_of_any_wave_the_ranks_of_a_group_read_from_different_peers(
    group_size: int,
) -> None:
    layer = r1_nvfp4(group_size)
    plans = [plan_layer_copies(layer, rank, 32 * 2**20) for rank in range(group_size)]
    assert len({len(plan) for plan in plans}) == 1
    for waves in zip(*plans, strict=True):
        for copies in zip(*waves, strict=True):
            assert len({copy.peer_rank for copy in copies}) == group_size


def test_waves_begin_with_the_rank_after_our_own() -> None:
    layer = layer_of(8, 4, w=2 * 2**20)
    waves = plan_layer_copies(layer, rank=1, slice_bytes=2 * 2**20)
    assert [[copy.peer_rank for copy in wave] for wave in waves] == [[2, 3, 0]] * 2


@pytest.mark.parametrize(
    ("layer", "gigabytes", "num_runs", "num_waves", "num_slices"),
    [
        (r1_nvfp4(4), 4.76, 12, 48, 144),
        (r1_fp8(8), 9.87, 14, 42, 294),
        (r1_fp8(4), 8.46, 6, 84, 252),
        (qwen3_30b(2), 0.60, 2, 18, 18),
    ],
    ids=["R1 NVFP4 on 4", "R1 FP8 on 8", "R1 FP8 on 4", "Qwen3-30B bf16 on 2"],
)
def test_a_layer_costs_few_descriptors(
    layer: LayerLayout, gigabytes: float, num_runs: int, num_waves: int, num_slices: int
) -> None:
    """Half a microsecond each of the thread that launches kernels; of DeepSeek-R1 at most 400."""
    for rank in range(layer.group_size):
        plan = plan_layer_copies(layer, rank, CudaQueue.slice_bytes)
        assert sum(bytes_by_peer(plan).values()) / 1e9 == pytest.approx(gigabytes, rel=0.01)
        assert num_copies(layer, rank, 0) == num_runs
        assert (len(plan), sum(map(len, plan))) == (num_waves, num_slices)
    assert num_slices <= 400


def test_the_host_shares_a_small_layer_among_its_threads() -> None:
    """Its slices are what a thread takes at a time: with those of CUDA one thread would copy it all."""
    layer = layer_of(8, 2, w=2 * 2**20)
    assert num_copies(layer, 0, CudaQueue.slice_bytes) == 1
    assert num_copies(layer, 0, HostCopyQueue.slice_bytes) == 4


@settings(max_examples=40, deadline=None)
@given(
    num_layers=st.integers(1, 200),
    group_size=st.integers(2, 72),
    num_experts=st.integers(1, 512),
    rank=st.integers(0, 71),
    redundancy=st.integers(0, 8),
)
def test_plans_account_for_all_remote_bytes_at_any_scale(
    num_layers: int, group_size: int, num_experts: int, rank: int, redundancy: int
) -> None:
    smallest = -(-num_experts // group_size)
    placement = Placement(
        num_experts=num_experts,
        group_size=group_size,
        experts_per_rank=min(num_experts, smallest + redundancy) if redundancy else None,
    )
    weight = WeightLayout(name="w", placement=placement, expert_bytes=4096 * 3, page_bytes=4096)
    model = ModelLayout.plan([(f"l{index}", (weight,)) for index in range(num_layers)])
    rank %= group_size
    plan = plan_layer_copies(model.layers[-1], rank, slice_bytes=2**20)
    remote = num_experts - len(placement.resident[rank])
    assert sum(bytes_by_peer(plan).values()) == remote * weight.expert_bytes
    slot = SlotLayout.plan(model.layers, rank, 4096)
    assert slot.num_bytes == remote * weight.expert_bytes

"""Slots and mappings of DeepSeek-R1 on four ranks, counted over a driver without memory. NOT A GPU."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from tests.helpers.counted_memory import (
    NUM_LAYERS,
    PAGE,
    R1_BF16,
    R1_FP8,
    R1_NVFP4,
    CountedMemory,
    Rows,
    mapper_of,
    plan_model,
)
from tests.unit.planner.models import r1_on_gb200
from vllm_dwdp.layout.composite import WeightLayout
from vllm_dwdp.layout.model import ModelLayout
from vllm_dwdp.model_executor.composites import CompositeMapper
from vllm_dwdp.model_executor.rings import PrefetchRings
from vllm_dwdp.planner.memory import memory_bytes

GIB = 2**30
GB200_FABRIC_ENTRIES = 928
"""Of the NVLink table of one GPU, as TensorRT-LLM says; whether ours are counted so, nobody has seen."""


@contextmanager
def rank_0(layers: Sequence[Rows], group_size: int = 4) -> Iterator[CompositeMapper]:
    with ExitStack() as undo:
        memory = CountedMemory()
        yield mapper_of(memory, plan_model(layers, group_size), undo)


def slots_of(layers: Sequence[Rows], rings: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return what the status says of the slots, and what the driver gave for them."""
    with rank_0(layers) as mapper:
        before = mapper.device.device.created_bytes  # type: ignore[attr-defined]
        made = PrefetchRings(mapper, rings, 2**40)
        created = mapper.device.device.created_bytes - before  # type: ignore[attr-defined]
        made.close()
        return made.slot_bytes, created


def test_each_ring_has_as_many_and_as_large_slots_as_its_own_layers_need() -> None:
    """A drafter of one unquantised layer neither doubles nor enlarges anybody's slots."""
    target, drafter = [R1_NVFP4] * 3, [R1_BF16]
    alone, _ = slots_of(target, [[0, 1, 2]])
    only_drafter, _ = slots_of(drafter, [[0]])
    both, created = slots_of(target + drafter, [[0, 1, 2], [3]])
    assert alone / GIB == pytest.approx(2 * 4.43, abs=0.01)
    assert only_drafter / GIB == pytest.approx(15.75, abs=0.01)
    assert both == created == alone + only_drafter
    assert both / GIB == pytest.approx(24.6, abs=0.1), (
        "63 GiB with two slots of the largest for all"
    )


def test_a_forward_of_the_target_begins_no_copies_for_its_drafter() -> None:
    """Which may never run, and takes what it needs at its own first wait if it does."""
    with rank_0([R1_NVFP4] * 3 + [R1_BF16]) as mapper:
        rings = PrefetchRings(mapper, [[0, 1, 2], [3]], 2**40)
        for _ in range(2):
            rings.begin_forward()
            assert [counter.fills for counter in rings.counters()] == [2, 0]
        rings.close()


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_the_planner_counts_the_slots_that_a_rank_has(num_layers: int) -> None:
    shape = r1_on_gb200().shape
    model = r1_on_gb200(shape=replace(shape, moe_layers=tuple(range(3, 3 + num_layers))))
    made, _ = slots_of([R1_NVFP4] * num_layers, [list(range(num_layers))])
    assert made == pytest.approx(memory_bytes(model).slots, rel=0.001), "but for rounding to pages"


def counts(rows: Rows) -> dict[str, dict[str, int]]:
    """Count what rank 0 has mapped in each mode once it serves."""
    found = {}
    layers = range(NUM_LAYERS)
    for mode in ("direct", "prefetch", "auto"):
        with rank_0([rows] * NUM_LAYERS) as mapper:
            if mode != "prefetch":
                for index in layers:
                    mapper.direct_view(index)
            if mode != "direct":
                mapper.resources.callback(PrefetchRings(mapper, [list(layers)], 2**40).close)
            else:
                for peer in mapper.peers.values():
                    peer.close()
            found[mode] = mapper.device.mapping_counts()
    return found


@pytest.mark.parametrize(
    ("rows", "composites", "in_shard"), [(R1_FP8, 116, 117), (R1_NVFP4, 232, 233)]
)
def test_mappings_of_peers_against_the_fabric_table_of_a_gb200(
    rows: Rows, composites: int, in_shard: int
) -> None:
    """The table of docs/gpu.md: computed; that an entry is one mapping, or one range, is unverified."""
    found = counts(rows)
    peers = {mode: count["peer_allocations"] for mode, count in found.items()}
    assert peers == {
        "direct": 3 * composites,
        "prefetch": 3 * in_shard,
        "auto": 3 * composites + 3 * in_shard,
    }
    ranges = {mode: count["ranges"] for mode, count in found.items()}
    assert ranges == {"direct": composites, "prefetch": 3 + composites, "auto": 3 + 2 * composites}
    fits = {mode for mode, count in peers.items() if count <= GB200_FABRIC_ENTRIES}
    assert fits == ({"direct", "prefetch", "auto"} if rows is R1_FP8 else {"direct", "prefetch"})


def test_tensors_below_a_page_are_no_composites_and_save_their_handles() -> None:
    """R1 in block FP8: two scales a layer; 117 handles a rank for 232, and less of the shard."""
    layout = plan_model([R1_FP8] * NUM_LAYERS, 4)
    names = {weight.name for layer in layout.layers for weight in layer.weights}
    assert names == {"w13_weight", "w2_weight"}
    assert all(weight.num_bytes >= 2 * 4 * PAGE for weight in layout.layers[0].weights)
    assert len(layout.piece_bytes(0)) == 2 * NUM_LAYERS + 1
    as_composites = [
        WeightLayout(name=name, placement=placement, expert_bytes=size, page_bytes=PAGE)
        for placement in [layout.layers[0].weights[0].placement]
        for name, size in R1_FP8.items()
    ]
    mapped = ModelLayout.plan([("layer", tuple(as_composites))] * NUM_LAYERS)
    saved = sum(mapped.piece_bytes(0)) - sum(layout.piece_bytes(0))
    assert len(mapped.piece_bytes(0)) == 4 * NUM_LAYERS
    assert saved == 192 * 2**20

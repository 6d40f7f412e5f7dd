"""Byte layout: every byte of a composite tensor comes from exactly one right place."""

from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.strategies import models, weights
from vllm_dwdp.layout.composite import ByteRange, WeightLayout
from vllm_dwdp.layout.model import ModelLayout
from vllm_dwdp.layout.placement import Placement
from vllm_dwdp.layout.slots import SlotLayout


def covered(ranges: list[ByteRange]) -> list[int]:
    return [byte for span in ranges for byte in range(span.start, span.stop)]


@settings(max_examples=60, deadline=None)
@given(weights(max_ranks=6, max_experts=20), st.data())
def test_direct_segments_tile_the_range_with_pages_of_ranks_that_have_them(
    weight: WeightLayout, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, weight.placement.group_size - 1))
    segments = weight.direct_segments(rank)
    assert covered([segment.span for segment in segments]) == list(range(weight.mapped.stop))
    for segment in segments:
        pages = weight.shard_pages(segment.source_rank)
        assert pages.start <= segment.span.start and segment.span.stop <= pages.stop
        assert segment.span.start % weight.page_bytes == segment.span.stop % weight.page_bytes == 0


@settings(max_examples=60, deadline=None)
@given(weights(max_ranks=6, max_experts=20), st.data())
def test_resident_edges_and_remote_pages_are_the_whole_tensor_once(
    weight: WeightLayout, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, weight.placement.group_size - 1))
    edges = weight.edges(rank)
    copies = weight.remote_copies(rank)
    everything = [weight.resident(rank), *(e.span for e in edges), *(c.span for c in copies)]
    assert sorted(covered(everything)) == list(range(weight.num_bytes))
    for part in (*edges, *copies):
        loaded = weight.resident(part.source_rank)
        assert part.source_rank != rank
        assert loaded.start <= part.span.start and part.span.stop <= loaded.stop, (
            "copied from bytes that their holder loaded, not from its edges"
        )
    inside = weight.shard_pages(rank)
    assert all(inside.intersect(edge.span) == edge.span for edge in edges)


@settings(max_examples=60, deadline=None)
@given(models(), st.sampled_from([1, 2, 5]))
def test_shards_and_slots_give_every_byte_its_own_place(model: ModelLayout, pool: int) -> None:
    group_size = model.layers[0].weights[0].placement.group_size
    for rank in range(group_size):
        shard: list[int] = []
        slot = SlotLayout.plan(model.layers, rank, pool * 16)
        assert sum(slot.allocations) == slot.num_bytes
        edges = {0, *accumulate(slot.allocations)}
        for layer in model.layers:
            for index, weight in enumerate(layer.weights):
                pages = weight.shard_pages(rank)
                shard += [
                    layer.shard_offset(index, rank, byte) for byte in range(pages.start, pages.stop)
                ]
            parts = slot.parts(layer, rank)
            places = [part.slot_offset + byte for part in parts for byte in range(len(part.span))]
            assert len(set(places)) == len(places) == layer.remote_bytes(rank)
            assert all(0 <= place < slot.num_bytes for place in places)
            for part in parts:
                assert {part.slot_offset, part.slot_offset + len(part.span)} <= edges, (
                    "a part ends within an allocation, which a device may not map"
                )
            remote = sorted((index, *_bounds(part)) for index, part in layer.remote_parts(rank))
            assert _merged(sorted((p.weight, *_bounds(p.span)) for p in parts)) == _merged(remote)
        assert shard == list(range(model.composite_bytes[rank]))


def _bounds(span: ByteRange) -> tuple[int, int]:
    return span.start, span.stop


def _merged(spans: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    merged: list[tuple[int, int, int]] = []
    for weight, start, stop in spans:
        if merged and merged[-1][0] == weight and merged[-1][2] == start:
            merged[-1] = (weight, merged[-1][1], stop)
        else:
            merged.append((weight, start, stop))
    return merged


@settings(max_examples=60, deadline=None)
@given(weights(max_ranks=6, max_experts=20))
def test_every_direct_segment_of_every_rank_is_whole_pieces_of_its_source(
    weight: WeightLayout,
) -> None:
    ranks = range(weight.placement.group_size)
    pieces = {rank: weight.shard_pieces(rank) for rank in ranks}
    for rank in ranks:
        assert covered(list(pieces[rank])) == covered([weight.shard_pages(rank)])
        for segment in weight.direct_segments(rank):
            inside = [
                piece
                for piece in pieces[segment.source_rank]
                if segment.span.start <= piece.start and piece.stop <= segment.span.stop
            ]
            assert covered(inside) == covered([segment.span])


def test_experts_that_end_on_pages_make_one_piece() -> None:
    weight = WeightLayout(
        name="w13_weight",
        placement=Placement(num_experts=9, group_size=3),
        expert_bytes=3 * 4096,
        page_bytes=4096,
    )
    assert [len(weight.shard_pieces(rank)) for rank in range(3)] == [1, 1, 1]


def test_a_tensor_smaller_than_a_page_is_whole_on_every_rank() -> None:
    weight = WeightLayout(
        name="w2_bias",
        placement=Placement(num_experts=8, group_size=4),
        expert_bytes=16,
        page_bytes=4096,
    )
    for rank in range(4):
        assert weight.remote_pages(rank) == ()
        assert sum(len(edge.span) for edge in weight.edges(rank)) == 6 * 16

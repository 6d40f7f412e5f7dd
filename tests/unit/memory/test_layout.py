"""Byte layout: every byte of a composite tensor comes from exactly one right place."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.strategies import models, weights
from vllm_dwdp.memory.layout import ByteRange, ModelLayout, WeightLayout


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
@given(models())
def test_shards_and_slots_give_every_byte_its_own_place(model: ModelLayout) -> None:
    group_size = model.layers[0].weights[0].placement.group_size
    for rank in range(group_size):
        shard: list[int] = []
        for layer in model.layers:
            slot: list[int] = []
            for index, weight in enumerate(layer.weights):
                pages = weight.shard_pages(rank)
                shard += [
                    layer.shard_offset(index, rank, byte) for byte in range(pages.start, pages.stop)
                ]
                slot += [
                    layer.slot_offset(rank, index, byte)
                    for part in weight.remote_pages(rank)
                    for byte in range(part.start, part.stop)
                ]
            assert slot == list(range(layer.slot_bytes(rank)))
        assert shard == list(range(model.shard_bytes[rank]))


def test_a_tensor_smaller_than_a_page_is_whole_on_every_rank() -> None:
    from vllm_dwdp.placement import Placement

    weight = WeightLayout(
        name="w2_bias",
        placement=Placement(num_experts=8, group_size=4),
        expert_bytes=16,
        page_bytes=4096,
    )
    for rank in range(4):
        assert weight.remote_pages(rank) == ()
        assert sum(len(edge.span) for edge in weight.edges(rank)) == 6 * 16

"""Private rows in a shard: each has its own place, and every rank gets every row once."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.strategies import models
from vllm_dwdp.layout.composite import WeightLayout
from vllm_dwdp.layout.model import ModelLayout, PrivateRows
from vllm_dwdp.layout.placement import Placement

PAGE = 16


@st.composite
def models_with_rows(draw: st.DrawFn) -> ModelLayout:
    """Return a model whose layers also have small tensors, of the same placements."""
    model = draw(models())
    private = [
        PrivateRows(placement=layer.weights[0].placement, row_bytes=draw(st.integers(1, 9)))
        for layer in model.layers
        for _ in range(draw(st.integers(0, 2)))
    ]
    return ModelLayout.plan([(layer.name, layer.weights) for layer in model.layers], private)


@settings(max_examples=60, deadline=None)
@given(models_with_rows())
def test_rows_lie_behind_the_composites_one_after_the_other(model: ModelLayout) -> None:
    for rank in range(model.group_size):
        places = [
            model.private_offset(index, rank, expert) + byte
            for index, rows in enumerate(model.private)
            for expert in range(
                rows.placement.resident[rank].start, rows.placement.resident[rank].stop
            )
            for byte in range(rows.row_bytes)
        ]
        start = model.composite_bytes[rank]
        assert places == list(range(start, start + len(places)))
        assert start + len(places) <= model.shard_bytes(rank) < start + len(places) + PAGE
        assert sum(model.piece_bytes(rank)) == model.shard_bytes(rank)
        assert all(piece % PAGE == 0 and piece for piece in model.piece_bytes(rank))


@settings(max_examples=60, deadline=None)
@given(models_with_rows())
def test_every_row_comes_from_one_rank_that_loaded_it(model: ModelLayout) -> None:
    for rows in model.private:
        for rank in range(model.group_size):
            own = rows.placement.resident[rank]
            taken = list(range(own.start, own.stop))
            for source, experts in rows.sources(rank):
                assert source != rank
                held = rows.placement.resident[source]
                assert held.start <= experts.start and experts.stop <= held.stop
                taken += range(experts.start, experts.stop)
            assert sorted(taken) == list(range(rows.placement.num_experts))


def test_a_model_without_small_tensors_has_no_part_for_them() -> None:
    placement = Placement(num_experts=4, group_size=2)
    weight = WeightLayout(name="w", placement=placement, expert_bytes=8, page_bytes=PAGE)
    model = ModelLayout.plan([("layer", (weight,))])
    assert model.private_bytes(0) == 0 and len(model.piece_bytes(0)) == 1

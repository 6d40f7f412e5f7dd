"""The copy plan: every remote byte once, from a holder, cut and rotated."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.strategies import models
from vllm_dwdp.layout.composite import WeightLayout
from vllm_dwdp.layout.model import LayerLayout, ModelLayout
from vllm_dwdp.layout.placement import Placement
from vllm_dwdp.layout.slots import SlotLayout
from vllm_dwdp.prefetch.copy_plan import bytes_by_peer, plan_layer_copies


def fill(layer: LayerLayout, rank: int, slice_bytes: int) -> dict[tuple[int, int], tuple[int, int]]:
    """Run a plan byte by byte: (weight, byte of its tensor) -> (peer, offset in its shard)."""
    filled: dict[tuple[int, int], tuple[int, int]] = {}
    for copy in plan_layer_copies(layer, rank, slice_bytes):
        assert copy.peer_rank != rank and 0 < copy.num_bytes <= slice_bytes
        for step in range(copy.num_bytes):
            place = (copy.weight, copy.offset + step)
            assert place not in filled, "a byte is copied twice"
            filled[place] = (copy.peer_rank, copy.source_offset + step)
    return filled


@settings(max_examples=80, deadline=None)
@given(models(), st.integers(7, 300))
def test_every_remote_byte_is_copied_once_from_where_its_holder_keeps_it(
    model: ModelLayout, slice_bytes: int
) -> None:
    for layer in model.layers:
        for rank in range(layer.weights[0].placement.group_size):
            expected = {}
            for index, part in layer.remote_parts(rank):
                weight = layer.weights[index]
                for byte in range(part.start, min(part.stop, weight.num_bytes)):
                    holder = weight.placement.source(byte // weight.expert_bytes, rank)
                    expected[index, byte] = (holder, layer.shard_offset(index, holder, byte))
            assert fill(layer, rank, slice_bytes) == expected


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


def test_slices_rotate_over_the_peers_starting_after_our_own_rank() -> None:
    weight = WeightLayout(
        name="w",
        placement=Placement(num_experts=8, group_size=4),
        expert_bytes=4096,
        page_bytes=4096,
    )
    layer = ModelLayout.plan([("l", (weight,))]).layers[0]
    order = [copy.peer_rank for copy in plan_layer_copies(layer, rank=1, slice_bytes=4096)]
    assert order == [2, 3, 0, 2, 3, 0]

"""Hypothesis strategies shared by the property tests of the pure core."""

from hypothesis import strategies as st

from vllm_dwdp.layout.composite import WeightLayout
from vllm_dwdp.layout.model import ModelLayout
from vllm_dwdp.layout.placement import Placement


@st.composite
def placements(draw: st.DrawFn, max_ranks: int = 72, max_experts: int = 512) -> Placement:
    """Any group, any expert count that covers it, any redundancy."""
    group_size = draw(st.integers(1, max_ranks))
    num_experts = draw(st.integers(1, max_experts))
    smallest = -(-num_experts // group_size)
    per_rank = draw(st.none() | st.integers(smallest, num_experts))
    return Placement(num_experts=num_experts, group_size=group_size, experts_per_rank=per_rank)


@st.composite
def weights(draw: st.DrawFn, **limits: int) -> WeightLayout:
    """One composite tensor; experts may be smaller or larger than a page and end anywhere."""
    return WeightLayout(
        name="w13_weight",
        placement=draw(placements(**limits)),
        expert_bytes=draw(st.integers(1, 300)),
        page_bytes=draw(st.sampled_from([16, 64])),
    )


@st.composite
def models(draw: st.DrawFn, max_layers: int = 4) -> ModelLayout:
    """A few layers of one group; the layers may differ in experts and sizes."""
    group_size = draw(st.integers(2, 5))
    layers = []
    for index in range(draw(st.integers(1, max_layers))):
        num_experts = draw(st.integers(1, 12))
        smallest = -(-num_experts // group_size)
        placement = Placement(
            num_experts=num_experts,
            group_size=group_size,
            experts_per_rank=draw(st.none() | st.integers(smallest, num_experts)),
        )
        sizes = draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))
        layers.append(
            (
                f"layers.{index}",
                tuple(
                    WeightLayout(
                        name=f"w{number}", placement=placement, expert_bytes=size, page_bytes=16
                    )
                    for number, size in enumerate(sizes)
                ),
            )
        )
    return ModelLayout.plan(layers)

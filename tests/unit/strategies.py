"""Hypothesis strategies shared by the property tests of the pure core."""

from dataclasses import replace

from hypothesis import strategies as st

from vllm_dwdp.layout.composite import WeightLayout
from vllm_dwdp.layout.model import ModelLayout
from vllm_dwdp.layout.placement import Placement
from vllm_dwdp.prefetch.mode_policy import LayerCosts


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
    """Return a few layers of one group; the layers may differ in experts and sizes."""
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


@st.composite
def layer_costs(draw: st.DrawFn) -> LayerCosts:
    """Any MoE layer on any machine; its compute has a part for each token, and one for each step."""
    num_experts = draw(st.integers(2, 512))
    num_remote = draw(st.integers(1, num_experts))
    fixed, per_token = draw(st.floats(0, 1e-2)), draw(st.floats(0, 1e-3))
    return LayerCosts(
        num_experts=num_experts,
        num_remote_experts=num_remote,
        experts_per_token=draw(st.integers(1, min(16, num_experts))),
        remote_bytes=num_remote * draw(st.integers(2**10, 2**27)),
        copy_bytes_per_s=draw(st.floats(1e9, 1e12)),
        direct_bytes_per_s=draw(st.floats(1e8, 1e13)),
        compute_seconds=lambda num_tokens: fixed + per_token * num_tokens,
        beside_copies=draw(st.sampled_from([0.0, 0.5, 0.766, 1.0])),
    )


def scaled(layer: LayerCosts, times: float) -> LayerCosts:
    """Return the same layer with so many times the compute."""
    return replace(
        layer, compute_seconds=lambda num_tokens: times * layer.compute_seconds(num_tokens)
    )

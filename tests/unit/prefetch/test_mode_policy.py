"""The choice between reading in place and copying, against its own cost model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dwdp.prefetch.mode_policy import LayerCosts, Mode, ModePolicy


@st.composite
def costs(draw: st.DrawFn) -> LayerCosts:
    num_experts = draw(st.integers(2, 512))
    return LayerCosts(
        num_experts=num_experts,
        num_remote_experts=draw(st.integers(1, num_experts)),
        experts_per_token=draw(st.integers(1, min(16, num_experts))),
        expert_bytes=draw(st.integers(2**10, 2**27)),
        copy_bytes_per_s=draw(st.floats(1e9, 1e12)),
        direct_bytes_per_s=draw(st.floats(1e8, 1e12)),
        other_seconds=draw(st.floats(0, 1e-2)),
    )


@given(costs())
def test_the_threshold_is_where_the_costs_cross(layer: LayerCosts) -> None:
    limit = layer.direct_max_tokens
    assert limit >= 0
    if 0 < limit < 10_000:
        assert layer.direct_seconds(limit) <= layer.prefetch_seconds * (1 + 1e-6)
    if limit < 10_000 and layer.experts_per_token < layer.num_experts:
        assert layer.direct_seconds(limit + 1) >= layer.prefetch_seconds * (1 - 1e-6)


@given(costs(), st.integers(0, 4096))
def test_more_tokens_need_more_experts_and_never_more_than_there_are(
    layer: LayerCosts, num_tokens: int
) -> None:
    now = layer.expected_remote_experts(num_tokens)
    assert 0 <= now <= layer.expected_remote_experts(num_tokens + 1) <= layer.num_remote_experts
    assert layer.expected_remote_experts(1) == pytest.approx(
        layer.num_remote_experts * layer.experts_per_token / layer.num_experts
    )


def test_the_threshold_of_mixtral_on_h100() -> None:
    """Copies at 71 % and in-place reads at 70 % of 450 GB/s: direct pays up to a dozen tokens."""
    layer = LayerCosts(
        num_experts=8,
        num_remote_experts=4,
        experts_per_token=2,
        expert_bytes=3 * 4096 * 14336 * 2,
        copy_bytes_per_s=0.71 * 450e9,
        direct_bytes_per_s=0.70 * 450e9,
        other_seconds=0.0,
    )
    assert 10 <= layer.direct_max_tokens <= 15


def test_forced_modes_obey() -> None:
    for mode in Mode:
        policy = ModePolicy.forced(mode)
        assert policy.modes == {mode} and policy.name == mode.value
        assert {policy.mode_for(tokens) for tokens in (0, 1, 100, 10**6)} == {mode}
        assert mode.value in policy.reason


def test_the_host_reads_in_place() -> None:
    for shares_compute in (True, False):
        policy = ModePolicy.direct_only(shares_compute=shares_compute)
        assert policy.modes == {Mode.DIRECT}
        assert ("copies would share" in policy.reason) == shares_compute


@given(costs(), st.integers(0, 10_000))
def test_a_limit_set_by_the_user_goes_before_the_models(layer: LayerCosts, limit: int) -> None:
    policy = ModePolicy.from_costs(layer, limit)
    assert policy.mode_for(limit) is Mode.DIRECT
    assert policy.mode_for(limit + 1) is Mode.PREFETCH
    assert policy.modes == (set(Mode) if limit else {Mode.PREFETCH})
    assert policy.name == ("auto" if limit else "prefetch")

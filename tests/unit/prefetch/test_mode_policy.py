"""The choice between reading in place and copying, against its own cost model."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import layer_costs, scaled
from vllm_dwdp.prefetch.mode_policy import (
    MOST_DIRECT_TOKENS,
    LayerCosts,
    Mode,
    ModePolicy,
)

R1_NVFP4 = LayerCosts(
    num_experts=256,
    num_remote_experts=192,
    experts_per_token=8,
    remote_bytes=4.76e9,
    copy_bytes_per_s=643e9,
    direct_bytes_per_s=643e9,
    compute_seconds=lambda num_tokens: 7.4e-3 * num_tokens / 8192,
)
"""Of four ranks; a layer of 8K tokens computes as long as its copies take."""
LARGE_STEP = 16_384


def policy_of(layer: LayerCosts) -> ModePolicy:
    return ModePolicy.by_tokens(layer.direct_max_tokens, layer.break_even_tokens)


@given(layer_costs())
def test_the_limit_is_where_the_costs_cross_or_direct_may_go_no_further(layer: LayerCosts) -> None:
    limit = layer.direct_max_tokens
    assert 0 <= limit <= MOST_DIRECT_TOKENS
    if limit:
        assert layer.direct_seconds(limit) <= layer.prefetch_seconds(limit)
    following, hidden_from = limit + 1, layer.break_even_tokens or math.inf
    if following <= MOST_DIRECT_TOKENS and following < hidden_from:
        assert layer.direct_seconds(following) > layer.prefetch_seconds(following)


@given(layer_costs(), st.floats(1.0, 1000.0))
def test_more_compute_per_step_never_makes_direct_better(layer: LayerCosts, times: float) -> None:
    assert scaled(layer, times).direct_max_tokens <= layer.direct_max_tokens


@given(layer_costs())
def test_a_step_that_hides_its_copies_never_reads_in_place(layer: LayerCosts) -> None:
    if (hidden_from := layer.break_even_tokens) is not None:
        assert policy_of(layer).mode_for(hidden_from) is Mode.PREFETCH


@given(layer_costs(), *[st.floats(0.95, 1.05)] * 3)
def test_noise_never_flips_the_mode_of_a_large_step(
    layer: LayerCosts, copies: float, reads: float, compute: float
) -> None:
    noisy = replace(
        scaled(layer, compute),
        copy_bytes_per_s=layer.copy_bytes_per_s * copies,
        direct_bytes_per_s=layer.direct_bytes_per_s * reads,
    )
    for measured in (layer, noisy):
        assert policy_of(measured).mode_for(LARGE_STEP) is Mode.PREFETCH


@given(layer_costs(), st.floats(1.0, 1e6))
def test_reads_that_look_faster_than_copies_count_as_equal(layer: LayerCosts, times: float) -> None:
    equal = replace(layer, direct_bytes_per_s=layer.copy_bytes_per_s)
    faster = replace(layer, direct_bytes_per_s=layer.copy_bytes_per_s * times)
    assert faster.direct_max_tokens == equal.direct_max_tokens
    assert policy_of(faster).name != "direct"


@pytest.mark.parametrize("direct_gbps", [610, 640, 643, 645, 677, 6430])
def test_a_hair_in_a_measurement_does_not_matter(direct_gbps: float) -> None:
    """R1 in NVFP4 on four ranks, copies at 643 GB/s: five per cent either way, and nonsense."""
    limit = replace(R1_NVFP4, direct_bytes_per_s=direct_gbps * 1e9).direct_max_tokens
    assert R1_NVFP4.direct_max_tokens == pytest.approx(130, abs=3)
    assert limit == pytest.approx(R1_NVFP4.direct_max_tokens, rel=0.35)
    if direct_gbps >= 643:
        assert limit == R1_NVFP4.direct_max_tokens


def test_an_expert_of_many_tokens_is_read_once_for_each_of_its_tiles() -> None:
    assert [R1_NVFP4.readings(tokens) for tokens in (1, 2048, 4096, LARGE_STEP)] == [1, 1, 2, 8]
    whole = R1_NVFP4.copy_seconds
    read = R1_NVFP4.direct_seconds(LARGE_STEP) - R1_NVFP4.compute_seconds(LARGE_STEP)
    assert read == pytest.approx(8 * whole)


def test_the_break_even_is_where_compute_hides_the_copies() -> None:
    needed = R1_NVFP4.break_even_tokens
    assert needed == pytest.approx(8192, rel=0.01)
    assert R1_NVFP4.compute_seconds(needed) >= R1_NVFP4.copy_seconds * (1 - 1e-6)
    assert R1_NVFP4.compute_seconds(needed - 1) < R1_NVFP4.copy_seconds
    slowed = replace(R1_NVFP4, beside_copies=0.75)
    assert slowed.break_even_tokens == pytest.approx(0.75 * needed, rel=0.01)
    assert replace(R1_NVFP4, beside_copies=0.0).break_even_tokens is None
    assert scaled(R1_NVFP4, 1e-6).break_even_tokens is None


@given(layer_costs(), st.integers(0, 4096))
def test_more_tokens_need_more_experts_and_never_more_than_there_are(
    layer: LayerCosts, num_tokens: int
) -> None:
    now = layer.expected_remote_experts(num_tokens)
    assert 0 <= now <= layer.expected_remote_experts(num_tokens + 1) <= layer.num_remote_experts
    assert layer.expected_remote_experts(1) == pytest.approx(
        layer.num_remote_experts * layer.experts_per_token / layer.num_experts
    )


def test_forced_modes_obey() -> None:
    for mode in Mode:
        policy = ModePolicy.forced(mode)
        assert policy.modes == {mode} and policy.name == mode.value
        assert {policy.mode_for(tokens) for tokens in (0, 1, 100, 10**6)} == {mode}
        assert mode.value in policy.reason and policy.limit is None


def test_the_host_reads_in_place() -> None:
    for shares_compute in (True, False):
        policy = ModePolicy.direct_only(shares_compute=shares_compute)
        assert policy.modes == {Mode.DIRECT}
        assert ("copies would share" in policy.reason) == shares_compute


@given(st.integers(0, 10_000))
def test_a_limit_divides_the_steps(limit: int) -> None:
    policy = ModePolicy.by_tokens(limit, None, was_set=True)
    assert policy.mode_for(limit) is Mode.DIRECT
    assert policy.mode_for(limit + 1) is Mode.PREFETCH
    assert policy.modes == (set(Mode) if limit else {Mode.PREFETCH})
    assert policy.name == ("auto" if limit else "prefetch")
    assert policy.limit == limit and policy.reason == "direct_max_tokens was set"
    assert f"up to {limit} tokens" in ModePolicy.by_tokens(limit, None).reason

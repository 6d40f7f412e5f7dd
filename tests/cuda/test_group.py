"""A rank's views on the CUDA device, over the fake driver. NOT A GPU."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest

from gpu_checks.expert_ranks import ExpertShape, local_ranks
from gpu_checks.fake import fake_settings, live_objects
from gpu_checks.simulated_cuda import SimulatedCudaMemory
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpMemoryError
from vllm_dwdp.model_executor import views
from vllm_dwdp.model_executor.views import ExpertViews, bind_views
from vllm_dwdp.prefetch.mode_policy import LayerCosts, Mode

LARGE = ExpertShape(num_experts=8, hidden_size=1024, intermediate_size=1024, top_k=2)
SMALL = ExpertShape(num_experts=8, hidden_size=64, intermediate_size=64, top_k=2)
"""Less than a page of 2 MiB a tensor: edges make every shard whole."""
NUM_PEER_MAPPINGS = 2 * 4 * 2
"""Of `LARGE`, both ranks being here: two tensors of four layers, one piece each."""


@contextmanager
def bound_views(shape: ExpertShape, **options: Any) -> Iterator[tuple[ExpertViews, dict[str, Any]]]:
    """The views of rank 0 of two in `auto` mode; and what its layers were bound to, by position."""
    memory = SimulatedCudaMemory()
    with (
        closing(memory),
        ExitStack() as resources,
        local_ranks(memory, shape, 4, 2) as ranks,
    ):
        bound: dict[str, Any] = {}
        for entry in ranks[0].shard.published:
            entry.layer.use = lambda binding: bound.setdefault(
                str(binding.ring_position), binding.tensors
            )
        yield bind_views(ranks[0].mapper(), DwdpConfig(group_size=2, **options), resources), bound


def test_a_rank_that_holds_every_page_reads_in_place() -> None:
    """There is nothing to copy and nothing to measure, though experts are remote by number."""
    with bound_views(SMALL) as (made, bound):
        assert made.policy.modes == {Mode.DIRECT}
        assert made.policy.reason == "this rank's memory holds all experts"
        assert made.rings is None and list(bound) == ["None"]


def test_auto_measures_and_keeps_both_views() -> None:
    with bound_views(LARGE, direct_max_tokens=5) as (made, bound):
        assert made.policy.name == "auto"
        assert made.rings is not None and made.rings.slot_bytes > 0
        assert len(bound) == 1 + 4, "in place, and in the ring's four positions"


def test_direct_views_are_given_back_where_no_step_reads_in_place() -> None:
    with bound_views(LARGE, direct_max_tokens=0) as (made, bound):
        assert made.policy.modes == {Mode.PREFETCH} and len(bound) == 4
        without = live_objects()
    with bound_views(LARGE, mode="prefetch"):
        assert live_objects() == without, "a view was kept that no forward uses"


@pytest.mark.parametrize(
    "settings", [{"mixed_access": 0}, {"peer_mappings": NUM_PEER_MAPPINGS + 5}]
)
def test_where_peers_cannot_be_mapped_in_place_auto_copies_and_direct_is_refused(
    settings: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    """Access over memory of several devices is refused, or so many mappings of peers' memory."""
    with fake_settings(**settings):
        with bound_views(LARGE) as (made, bound):
            assert made.policy.modes == {Mode.PREFETCH} and len(bound) == 4
            assert made.policy.reason == "this device maps no peers' experts in place"
            assert made.begin_forward(1) is Mode.PREFETCH
            without = live_objects()
        with bound_views(LARGE, mode="prefetch"):
            assert live_objects() == without, "part of a direct view was kept"
        with (
            pytest.raises(
                DwdpMemoryError, match=r'in place, as dwdp mode "direct" .*Set .*"prefetch"'
            ),
            bound_views(LARGE, mode="direct"),
        ):
            pass
    assert "DWDP rank 0 copies experts in every step, because they cannot" in caplog.text


def test_slots_are_given_back_where_direct_always_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    class Costs(LayerCosts):
        @property
        def direct_max_tokens(self) -> float:
            return math.inf

    slow_link = Costs(
        num_experts=8,
        num_remote_experts=4,
        experts_per_token=2,
        expert_bytes=1,
        copy_bytes_per_s=1.0,
        direct_bytes_per_s=9.0,
        other_seconds=1.0,
    )
    with monkeypatch.context() as patch:
        patch.setattr(views, "measure_costs", lambda *_: slow_link)
        patch.setattr(views, "check_views", lambda *_: None)
        with bound_views(LARGE) as (made, bound):
            assert made.policy.modes == {Mode.DIRECT}
            assert made.rings is None and list(bound) == ["None"]
            without = live_objects()
    with bound_views(LARGE, mode="direct"):
        assert live_objects() == without, "slots, ring views or a copy stream were kept"

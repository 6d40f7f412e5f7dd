"""A rank's policy and views on the CUDA device, over the fake driver. NOT A GPU."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest

from gpu_checks.expert_ranks import ExpertShape, RankMemory, local_ranks
from gpu_checks.fake import fake_settings, live_objects
from gpu_checks.simulated_cuda import SimulatedCudaMemory
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpMemoryError
from vllm_dwdp.model_executor import costs
from vllm_dwdp.model_executor.costs import ServedModel, choose_policy, measured_costs
from vllm_dwdp.model_executor.measure import Speeds
from vllm_dwdp.model_executor.views import ExpertViews, bind_views
from vllm_dwdp.prefetch.mode_policy import MOST_DIRECT_TOKENS, LayerCosts, Mode, ModePolicy

LARGE = ExpertShape(num_experts=8, hidden_size=1024, intermediate_size=1024, top_k=2)
SMALL = ExpertShape(num_experts=8, hidden_size=64, intermediate_size=64, top_k=2)
"""Less than a page of 2 MiB a tensor: edges make every shard whole."""
NUM_PEER_MAPPINGS = 2 * 4 * 2
"""Of `LARGE`, both ranks being here: two tensors of four layers, one piece each."""
SERVED = ServedModel(config={}, max_num_batched_tokens=64, max_model_len=512)


def costs_of(rank: RankMemory, config: DwdpConfig) -> LayerCosts | None:
    """Return what a start measures on `rank`."""
    published = rank.shard.published
    return measured_costs(
        config, rank.device, rank.layout, published, rank.dwdp_rank, rank.peers, SERVED
    )


@contextmanager
def two_ranks(shape: ExpertShape) -> Iterator[Sequence[RankMemory]]:
    memory = SimulatedCudaMemory()
    with closing(memory), local_ranks(memory, shape, 4, 2) as ranks:
        yield ranks


@contextmanager
def bound_views(shape: ExpertShape, **options: Any) -> Iterator[tuple[ExpertViews, dict[str, Any]]]:
    """Yield the views of rank 0 of two, alone; and what its layers were bound to, by position."""
    config = DwdpConfig(group_size=2, **options)
    with two_ranks(shape) as ranks, ExitStack() as resources:
        rank, bound = ranks[0], dict[str, Any]()
        for entry in rank.shard.published:
            entry.layer.use = lambda binding: bound.setdefault(
                str(binding.ring_position), binding.tensors
            )
        found = costs_of(rank, config)
        agreed = None if found is None else found.direct_max_tokens
        policy = choose_policy(config, rank.device, found, agreed)
        yield bind_views(rank.mapper(), policy, config.slice_bytes, resources), bound


def test_a_rank_that_holds_every_page_reads_in_place() -> None:
    """There is nothing to copy and nothing to measure, though experts are remote by number."""
    with bound_views(SMALL) as (made, bound):
        assert made.policy.modes == {Mode.DIRECT}
        assert made.policy.reason == "this rank's memory holds all experts"
        assert made.rings is None and list(bound) == ["None"]


def test_auto_keeps_both_views() -> None:
    with bound_views(LARGE, direct_max_tokens=5) as (made, bound):
        assert made.policy.name == "auto" and made.policy.reason == "direct_max_tokens was set"
        assert made.rings is not None and made.rings.slot_bytes > 0
        assert len(bound) == 1 + 4, "in place, and in the ring's four positions"


def test_no_direct_view_is_kept_where_no_step_reads_in_place() -> None:
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
        with bound_views(LARGE, direct_max_tokens=5) as (made, bound):
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


def test_a_mode_that_was_asked_for_has_one_view() -> None:
    with bound_views(LARGE, mode="direct"):
        without = live_objects()
    with bound_views(LARGE, mode="prefetch") as (made, bound):
        assert made.policy.modes == {Mode.PREFETCH} and len(bound) == 4
        assert live_objects().streams > without.streams


@pytest.mark.parametrize("direct_gbps", [640.0, 645.0, 64e6])
def test_no_measurement_makes_every_step_direct(
    monkeypatch: pytest.MonkeyPatch, direct_gbps: float
) -> None:
    """Reads that look as fast as copies, or a thousand times so."""
    speeds = Speeds(
        copy_bytes_per_s=643e9,
        direct_bytes_per_s=direct_gbps * 1e9,
        memory_bytes_per_s=8e12,
        operations_per_s=1e15,
    )
    said: list[str] = []
    monkeypatch.setattr(costs, "measure_speeds", lambda *_: speeds)
    monkeypatch.setattr(costs.logger, "warning", lambda text, *words: said.append(text % words))
    with bound_views(LARGE) as (made, _):
        assert made.policy.mode_for(MOST_DIRECT_TOKENS + 1) is Mode.PREFETCH
        assert made.rings is not None
    assert len(said) == (direct_gbps > 1000)
    assert all("times as fast as copies" in line for line in said)


def test_a_start_measures_what_the_fake_can_reach() -> None:
    with two_ranks(LARGE) as ranks:
        before = live_objects()
        found = costs_of(ranks[0], DwdpConfig(group_size=2))
        assert live_objects() == before, "measuring gives back what it took"
    assert found is not None and found.remote_bytes == ranks[0].layout.layers[0].remote_bytes(0)
    assert 1e6 < found.copy_bytes_per_s < 1e13 and 1e6 < found.direct_bytes_per_s < 1e13
    assert 0 <= found.direct_max_tokens <= MOST_DIRECT_TOKENS


def test_where_the_user_chose_in_place_nothing_is_measured() -> None:
    with two_ranks(LARGE) as ranks:
        config = DwdpConfig(group_size=2, mode="direct")
        assert costs_of(ranks[0], config) is None
        assert choose_policy(config, ranks[0].device, None, None) == ModePolicy.forced(Mode.DIRECT)

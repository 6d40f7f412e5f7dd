"""Who holds which expert."""

import pytest
from hypothesis import given

from tests.unit.strategies import placements
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.layout.placement import ExpertRange, Placement


@given(placements())
def test_every_expert_has_a_holder_and_every_rank_its_share(placement: Placement) -> None:
    held = [expert for span in placement.resident for expert in range(span.start, span.stop)]
    assert set(held) == set(range(placement.num_experts))
    if placement.experts_per_rank is None:
        assert len(held) == placement.num_experts, "without redundancy: stored exactly once"
        sizes = [len(span) for span in placement.resident]
        assert max(sizes) - min(sizes) <= 1


@given(placements(max_ranks=8, max_experts=40))
def test_redundancy_gives_each_rank_exactly_what_was_asked(placement: Placement) -> None:
    smallest = -(-placement.num_experts // placement.group_size)
    asked = placement.experts_per_rank
    if asked is not None and asked > smallest:
        assert {len(span) for span in placement.resident} == {asked}


@given(placements(max_ranks=12, max_experts=64))
def test_the_source_of_an_expert_holds_it_and_is_the_nearest_in_rotated_order(
    placement: Placement,
) -> None:
    size = placement.group_size
    for rank in range(size):
        for expert in range(placement.num_experts):
            source = placement.source(expert, rank)
            assert expert in placement.resident[source]
            if expert in placement.resident[rank]:
                assert source == rank
            nearer = [(rank + step) % size for step in range((source - rank) % size)]
            assert all(expert not in placement.resident[other] for other in nearer)


def test_a_count_that_does_not_divide_gives_the_first_ranks_one_more() -> None:
    placement = Placement(num_experts=10, group_size=4)
    assert placement.resident == (
        ExpertRange(0, 3),
        ExpertRange(3, 6),
        ExpertRange(6, 8),
        ExpertRange(8, 10),
    )


@pytest.mark.parametrize("per_rank", [1, 2, 11])
def test_experts_per_rank_out_of_range_names_the_range(per_rank: int) -> None:
    with pytest.raises(DwdpConfigError, match=rf"experts_per_rank={per_rank} .*\[3, 10\]"):
        Placement(num_experts=10, group_size=4, experts_per_rank=per_rank)

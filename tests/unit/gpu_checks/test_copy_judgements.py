"""What the questions about copies conclude, at and beyond the limits that were set before measuring."""

from itertools import pairwise

import pytest

from gpu_checks.copy_costs import (
    FILL_US,
    GraphCosts,
    IssueTimes,
    judge_graphs,
    judge_issue,
    spread_copies,
)
from gpu_checks.copy_speed import judge_speeds
from gpu_checks.value_nodes import judge_values


def times(behind: float) -> IssueTimes:
    return IssueTimes(idle=1.0, behind=behind, three=3 * behind)


@pytest.mark.parametrize(
    ("planned", "many", "verdict"),
    [
        (100.0, 50_000.0, "nothing to build: 300 copies hold the host for 100 us, 1%"),
        (FILL_US * 0.1, 1.0, "nothing to build"),
        (FILL_US * 0.1 + 1, 1.0, "AN ISSUING THREAD IS WORTH BUILDING"),
        (50_000.0, 50_000.0, "AN ISSUING THREAD IS WORTH BUILDING"),
    ],
)
def test_only_what_plans_make_decides_about_an_issuing_thread(
    planned: float, many: float, verdict: str
) -> None:
    """More copies than a plan has are asked about to know where the host blocks."""
    said = judge_issue({12: times(1.0), 300: times(planned), 4704: times(many)})
    assert said.startswith(verdict)


@pytest.mark.parametrize(
    ("launch_us", "mib", "verdict"),
    [
        (1000.0, 20.0, "nothing to build"),
        (1001.0, 1.0, "GRAPHS WITHOUT COPIES ARE WORTH BUILDING"),
        (10.0, 20.1, "GRAPHS WITHOUT COPIES ARE WORTH BUILDING"),
    ],
)
def test_graphs_give_up_their_copies_for_time_or_memory_only(
    launch_us: float, mib: float, verdict: str
) -> None:
    within = GraphCosts(capture_s=0.1, mib=mib, launch_us=launch_us)
    beyond = GraphCosts(capture_s=9.0, mib=900.0, launch_us=50_000.0)
    said = judge_graphs({1000: within, 127_000: beyond})
    assert said.startswith(verdict) and "a graph of 1000 copies" in said


@pytest.mark.parametrize(
    ("flagged", "said"),
    [
        ((250.0, 300.0, 310.0), "16 MiB reach 95% of a whole copy, and it changes little"),
        ((308.0, 309.0, 310.0), "2 MiB reach 95%"),
        ((80.0, 85.0, 87.0), "THE FLAG MAKES COPIES SLOWER BY 4x"),
        ((1500.0, 1580.0, 1600.0), "THE FLAG MAKES COPIES FASTER BY 5x"),
    ],
)
def test_slices_are_large_enough_and_the_flag_is_judged(
    flagged: tuple[float, ...], said: str
) -> None:
    sizes = (2 * 2**20, 16 * 2**20, 2**30)
    plain = dict.fromkeys(sizes, 320.0)
    by_flag = dict(zip(sizes, flagged, strict=True))
    assert said in judge_speeds({"batch": plain, "batch, overlap flag": by_flag})


def test_value_nodes_must_be_right_before_they_are_fast() -> None:
    assert judge_values({3, 1}, 1.0) == "not to be built: wrong layers [1, 3]"
    assert judge_values(set(), 0.89).startswith("not to be built: every layer is right, 89% hidden")
    assert judge_values(set(), 0.9).startswith("usable")


@pytest.mark.parametrize("gap", [0, 4096])
def test_copies_that_are_timed_touch_nothing_twice(gap: int) -> None:
    waves = spread_copies(0, 10, 3, gap=gap)
    assert [len(wave) for wave in waves] == [3, 3, 3, 1]
    copies = [copy for wave in waves for copy in wave]
    starts = sorted(address for copy in copies for address in copy[:2])
    assert len(starts) == 20
    assert all(later - early >= 4096 + gap for early, later in pairwise(starts))

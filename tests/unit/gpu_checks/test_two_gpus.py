"""What is concluded from numbers of two GPUs, on right and wrong ones."""

import pytest

from gpu_checks.two_gpus import attempt, judge_fault, judge_in_place, judge_rereads
from vllm_dwdp.errors import DwdpMemoryError


def speeds(amax: float, own: tuple[float, float], peer: tuple[float, float]) -> dict[str, float]:
    found = {"amax, own": 3000.0, "amax, peer's": amax}
    for tokens, mine, theirs in zip((16, 256), own, peer, strict=True):
        found |= {
            f"product of {tokens} tokens, own": mine,
            f"product of {tokens} tokens, peer's": theirs,
        }
    return found


@pytest.mark.parametrize(
    ("amax", "own", "peer", "said"),
    [
        (400, (2500, 2000), (390, 380), "a product reads a peer as fast as a reduction"),
        (400, (2500, 2000), (390, 100), "READS A PEER 4.0 TIMES SLOWER"),
        (400, (2500, 2000), (200, 400), "READS A PEER 2.0 TIMES SLOWER"),
        # Bound by compute, so no slower than over own memory: nothing is said against it.
        (400, (2500, 90), (390, 85), "a product reads a peer as fast as a reduction"),
    ],
)
def test_a_product_that_reads_slower_than_a_reduction_is_said(
    amax: float, own: tuple[float, float], peer: tuple[float, float], said: str
) -> None:
    assert said in judge_in_place(speeds(amax, own, peer))


@pytest.mark.parametrize(
    ("again", "once", "said"),
    [
        (2000, 400, "this GPU's cache keeps them"),
        (450, 400, "every read of a line crosses the link"),
    ],
)
def test_lines_that_a_cache_keeps_are_told_from_those_that_cross(
    again: float, once: float, said: str
) -> None:
    assert judge_rereads(again, once).startswith(said)


def test_a_fault_that_spreads_is_told_from_one_that_does_not() -> None:
    right = ["before right", "after its fault (700) right", "after its end right"]
    assert judge_fault(right).startswith("peers read on")
    for number, wrong in ((1, "after its fault (700) fails: 719"), (2, "after its end wrong")):
        found = [*right[:number], wrong, *right[number + 1 :]]
        assert judge_fault(found).startswith("THE FAULT SPREADS")


def test_a_refusal_is_an_answer() -> None:
    def refuse() -> None:
        raise DwdpMemoryError("INVALID_VALUE")

    assert attempt(refuse) == "refused (INVALID_VALUE)"
    assert attempt(lambda: None) == "accepted"

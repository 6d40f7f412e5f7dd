"""The lists for machines that are lent for minutes: what they name, what they cost, when they stop."""

import time
from collections.abc import Iterator

import pytest

from gpu_checks import order
from gpu_checks.asking import Result
from gpu_checks.order import (
    FIRST_MINUTES,
    TWO_GPUS,
    Block,
    Step,
    all_cases,
    ask_in_order,
    missing_names,
)
from gpu_checks.questions import QUESTIONS, Case


def test_every_name_in_the_lists_is_a_question() -> None:
    assert not missing_names(FIRST_MINUTES + TWO_GPUS)
    assert missing_names([Block("b", "c", (Step("no_such_question", 30),))]) == {"no_such_question"}


def test_the_first_minutes_are_45_of_one_gpu() -> None:
    minutes = [block.budget_s / 60 for block in FIRST_MINUTES]
    assert minutes == [3, 3, 2, 3, 4, 3, 8, 7, 5, 5, 2] and sum(minutes) == 45
    assert {case.question.num_gpus for case in all_cases(FIRST_MINUTES)} == {1}
    names = [name for block in FIRST_MINUTES for name in (step.name for step in block.steps)]
    assert names[0] == "which_device" and len(set(names)) == len(names)


def test_two_gpus_are_asked_everything_that_needs_two() -> None:
    asked = {case.question.name for case in all_cases(TWO_GPUS)}
    assert asked == {question.name for question in QUESTIONS if question.num_gpus == 2}


@pytest.mark.parametrize("blocks", [FIRST_MINUTES, TWO_GPUS])
def test_a_budget_holds_what_an_answer_costs(blocks: tuple[Block, ...]) -> None:
    """And the last argument of a step begins while there is time left for it."""
    for block in blocks:
        for step in block.steps:
            costs = [case.question.cost_s for case in step.cases]
            if not step.name.startswith("engines:"):
                assert sum(costs) <= step.budget_s, step
            assert step.budget_s >= 25, step


@pytest.mark.parametrize("blocks", [FIRST_MINUTES, TWO_GPUS])
def test_blocks_build_on_earlier_ones(blocks: tuple[Block, ...]) -> None:
    seen: set[str] = set()
    for block in blocks:
        assert set(block.builds_on) <= seen, block
        assert block.name not in seen and block.decides
        seen.add(block.name)


# --- asking --------------------------------------------------------------------------------------

BLOCKS = (
    Block("first", "one thing", (Step("races:full", 60), Step("races:eager", 60))),
    Block("second", "another", (Step("leaks", 60),), ("first",)),
    Block("third", "a third", (Step("costs", 60),)),
    Block("fourth", "what builds on the second", (Step("views:2", 60),), ("second",)),
)


def run(
    monkeypatch: pytest.MonkeyPatch, words: dict[str, str], missing: str = "", **options: float
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """(title, word, text) of each result, and what was announced."""

    def ask(cases: list[Case], deadline: float) -> Iterator[Result]:
        (case,) = cases
        left = deadline - time.monotonic()
        yield Result.of(case).end(words.get(case.title, "yes"), f"asked with {left:.0f} s")

    monkeypatch.setattr(order, "ask", ask)
    said: list[str] = []
    results = ask_in_order(
        BLOCKS,
        time.monotonic() + 1000,
        lambda case: "not here" if case.title == missing else "",
        said.append,
        **options,
    )
    return [(each.title, each.word, each.text) for each in results], said


def test_a_no_ends_its_block_and_what_builds_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found, said = run(monkeypatch, {"races:full": "NO"})
    reason = "races:full of block first is a NO"
    assert found == [
        ("races:full", "NO", "asked with 60 s"),
        ("races:eager", "NOT RUN", reason),
        ("leaks", "NOT RUN", reason),
        ("costs", "yes", "asked with 60 s"),
        ("views:2", "NOT RUN", reason),
    ]
    assert said[0] == "block first: one thing"
    assert said[1] == f"block second: another; left out: {reason}"
    assert said[2] == "block third: a third"


@pytest.mark.parametrize("word", ["fact", "bench", "NOT RUN"])
def test_only_a_no_ends_a_block(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = run(monkeypatch, {"races:full": word})
    assert [each[1] for each in found] == [word, "yes", "yes", "yes", "yes"]


def test_what_cannot_be_asked_is_skipped_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = run(monkeypatch, {}, missing="races:full")
    assert found[0] == ("races:full", "skip", "not here")
    assert {each[1] for each in found[1:]} == {"yes"}


def test_a_spent_budget_is_said_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = run(monkeypatch, {"races:full": "NOT RUN"})
    assert found[0][2] == "its budget of 60 s, or that of everything, is spent"
    found, _ = run(monkeypatch, {}, limit_s=400)
    assert found[0][2] == "asked with 400 s"


def test_a_steps_arguments_share_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """All cases of a step get one deadline."""
    now = iter([0.0] + [10.0 * number for number in range(20)])
    monkeypatch.setattr(order.time, "monotonic", lambda: next(now))
    deadlines = []

    def ask(cases: list[Case], deadline: float) -> Iterator[Result]:
        deadlines.append(deadline)
        yield Result.of(cases[0]).end("yes", "")

    monkeypatch.setattr(order, "ask", ask)
    blocks = (Block("b", "c", (Step("races", 100), Step("leaks", 30))),)
    titles = [each.title for each in ask_in_order(blocks, 1e9, lambda _: "", lambda _: None)]
    assert titles == ["races:full", "races:piecewise", "races:eager", "leaks"]
    assert deadlines[:3] == [100.0] * 3 and deadlines[3] != 100.0

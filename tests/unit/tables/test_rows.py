"""How rows, results and sentences become tables."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tables.record import Recorder, recorded
from tests.tables.render import count, entries, render
from tests.tables.rows import Row, rows_of
from tests.tables.said import Said


def results(**ended: str) -> dict[str, Any]:
    """One version, whose tests `a`, `b`, ... ended so."""
    tests = {f"tests/t.py::test_{name}": {"outcome": outcome} for name, outcome in ended.items()}
    return {"0.32.0": {"tests": tests, "is_main": True}}


def row(name: str, test: str, kind: str = "works", sentence: str = "") -> Row:
    return Row("feature", name, f"tests/t.py::test_{test}", kind, sentence)


def mark(*args: str, table: str = "feature", **kwargs: str) -> SimpleNamespace:
    return SimpleNamespace(name=table, args=args, kwargs=kwargs)


def test_a_mark_gives_a_row_for_each_of_its_names() -> None:
    marks = [
        mark("one", "two"),
        mark("three", refused="no."),
        mark(table="slow"),
        mark("four", table="model", stock_fails="oh."),
    ]
    assert list(rows_of("t", marks)) == [
        Row("feature", "one", "t"),
        Row("feature", "two", "t"),
        Row("feature", "three", "t", "refused", "no."),
        Row("model", "four", "t", "stock_fails", "oh."),
    ]


@pytest.mark.parametrize(
    "wrong", [mark(), mark("row", because="x"), mark("row", refused="x", stock_fails="y")]
)
def test_a_mark_that_says_something_else_is_an_error(wrong: Any) -> None:
    with pytest.raises(ValueError, match="is no row and at most one of refused, stock_fails"):
        list(rows_of("t", [wrong]))


@pytest.mark.parametrize(
    ("ended", "is_true"),
    [
        ({"a": "passed", "b": "passed"}, True),
        ({"a": "passed", "b": "failed"}, False),
        ({"a": "passed"}, False),  # b has not run
        ({"a": "passed", "b": "skipped"}, False),
        ({}, False),
    ],
)
def test_a_row_is_true_where_all_of_its_tests_passed(ended: dict[str, str], is_true: bool) -> None:
    (entry,) = entries([row("x", "a"), row("x", "b")], "feature", results(**ended))
    assert entry.is_true == is_true
    text = render("feature", [row("x", "a"), row("x", "b")], results(**ended))
    assert ("## Works" in text) == is_true
    assert ("## Not shown" in text) != is_true


def test_with_another_version_only_what_ran_counts() -> None:
    both = results(a="passed", b="passed")
    both["0.33.0"] = {"tests": {"tests/t.py::test_a": {"outcome": "passed"}}, "is_main": False}
    (entry,) = entries([row("x", "a"), row("x", "b")], "feature", both)
    assert entry.outcomes == {"0.32.0": "passed", "0.33.0": "passed"}
    both["0.33.0"]["tests"]["tests/t.py::test_a"]["outcome"] = "failed"
    (entry,) = entries([row("x", "a"), row("x", "b")], "feature", both)
    assert not entry.is_true
    both["0.33.0"]["tests"] = {}
    (entry,) = entries([row("x", "a")], "feature", both)
    assert entry.is_true and entry.outcomes["0.33.0"] == ""


def test_a_sentence_is_shown_with_its_row() -> None:
    rows = [row("x", "a", "refused", "Leave | out."), row("y", "b", "stock_fails", "boom")]
    text = render("feature", rows, results(a="passed", b="passed"))
    assert "| x | Leave \\| out. | [a](../tests/t.py) | yes |" in text
    assert "| y | boom | [b](../tests/t.py) | yes |" in text
    assert "## Works" not in text


def test_the_worst_phase_of_a_test_is_recorded_beside_what_is_known(tmp_path: Path) -> None:
    def report(outcome: str, skipped: bool = False) -> Any:
        reason = ("file", 1, "Skipped: no core") if skipped else None
        return SimpleNamespace(nodeid="t", outcome=outcome, skipped=skipped, longrepr=reason)

    for phases, expected in (
        (["passed", "passed", "failed"], "failed"),
        (["passed", "passed", "passed"], "passed"),
    ):
        recorder = Recorder(tmp_path)
        for outcome in phases:
            recorder.pytest_runtest_logreport(report(outcome))
        recorder.pytest_sessionfinish()
        (file,) = tmp_path.glob("*.json")
        assert recorded(file.stem, tmp_path)["tests"]["t"]["outcome"] == expected
    recorder = Recorder(tmp_path)
    recorder.pytest_runtest_logreport(report("skipped", True))
    recorder.pytest_sessionfinish()
    assert recorded(file.stem, tmp_path)["tests"]["t"]["reason"] == "no core"
    Recorder(tmp_path).pytest_sessionfinish()
    assert recorded(file.stem, tmp_path)["tests"]["t"]["outcome"] == "skipped"


def test_said_looks_for_every_sentence() -> None:
    said = Said(["Leave it out."])
    with pytest.raises(AssertionError):
        said("Keep it.")
    said("You may\n  not. Leave it\n out.")
    assert said.is_asked
    with pytest.raises(AssertionError, match="carries no row"):
        Said([])("anything")


def test_tests_are_counted_by_part() -> None:
    ended = {"tests/e2e/a.py::a": "passed", "tests/e2e/a.py::b": "failed", "tests/unit/c": "passed"}
    assert count(ended) == {
        "engines and servers": {"passed": 1, "failed": 1},
        "everything else": {"passed": 1},
    }

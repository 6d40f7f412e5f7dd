"""The list of questions, and a runner that takes nothing for passed that was not answered."""

import importlib
import json
import queue
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpu_checks import __main__ as program
from gpu_checks import asking
from gpu_checks.asking import MARK, Result, ask
from gpu_checks.questions import CASES, QUESTIONS, Case, Question, choose

ROOT = Path(__file__).parents[3]


def titles(*arguments: Any, **options: Any) -> list[str]:
    return [case.title for case in choose(*arguments, **options)]


def test_every_question_has_a_function_and_a_name_of_its_own() -> None:
    assert len({question.name for question in QUESTIONS}) == len(QUESTIONS)
    for question in QUESTIONS:
        module, _, name = question.function.partition(":")
        if question.needs in ("torch", "msgspec"):
            assert callable(getattr(importlib.import_module(f"gpu_checks.{module}"), name))
        assert question.text.endswith("?") or question.text.endswith(").")


def test_cases_are_chosen_by_title_name_and_tag() -> None:
    assert titles([], []) == list(CASES)
    assert titles(["leaks", "races:full"], []) == ["leaks", "races:full"]
    assert titles(["races"], ["races:eager"]) == ["races:full", "races:piecewise"]
    assert {CASES[title].question.tag for title in titles(["fact"], [])} == {"fact"}
    assert set(titles([], ["bench"])) == set(CASES) - set(titles(["bench"], []))


def test_listing_needs_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['gpu_checks', '--list']; from gpu_checks.__main__ import main; "
        "main(); assert 'torch' not in sys.modules"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert all(title in ended.stdout for title in CASES)


def test_the_product_knows_nothing_of_its_checks() -> None:
    sources = list((ROOT / "vllm_dwdp").rglob("*.py"))
    assert len(sources) > 50
    assert not [path for path in sources if "gpu_checks" in path.read_text()]


# --- asking --------------------------------------------------------------------------------------


class FakeChild:
    """A process that says what was prepared for it; an exception stands for silence."""

    prepared: list[list[Any]]

    def __init__(self, cases: list[Case]) -> None:
        self.lines = FakeChild.prepared.pop(0)
        self.process = self

    def next_line(self, deadline: float) -> str | None:
        line = self.lines.pop(0)
        if isinstance(line, dict):
            return MARK + json.dumps(line)
        if line == "silence":
            raise queue.Empty
        return line if isinstance(line, str) else None

    def wait(self) -> int:
        return self.lines.pop(0) if self.lines else 0

    def kill(self) -> None:
        pass


def question(tag: str, *arguments: str, **options: Any) -> list[Case]:
    made = Question("made_up", tag, 1, "module:name", "Is it?", **options)  # type: ignore[arg-type]
    return [Case(made, argument) for argument in arguments or ("",)]


@pytest.mark.parametrize(
    ("tag", "lines", "word", "answered"),
    [
        ("must", [{"found": "well"}, None, 0], "yes", True),
        ("must", [{"error": "AssertionError: wrong"}, None, 0], "NO", False),
        ("must", ["Traceback\n", None, -11], "NO", False),
        ("must", [{"found": "well"}, None, -11], "NO", False),  # a crash at its end
        ("must", [None, 0], "NO", False),
        ("must", ["silence"], "NO", False),
        ("fact", [{"found": "it does"}, None, 0], "fact", True),
        ("fact", ["silence"], "fact", False),
        ("fact", [None, -6], "fact", False),
        ("bench", [{"row": {"ms": 1}}, {"found": "1 ms"}, None, 0], "bench", True),
        ("bench", [{"row": {"ms": 1}}, {"error": "BROKEN"}, None, 0], "NO", False),
    ],
)
def test_no_answer_is_taken_for_one(
    tag: str, lines: list[Any], word: str, answered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "Child", FakeChild)
    FakeChild.prepared = [lines]
    (result,) = ask(question(tag), time.monotonic() + 100)
    assert (result.word, result.answered) == (word, answered)
    assert len(result.rows) == (tag == "bench")


def test_cases_that_share_a_process_go_on_in_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "Child", FakeChild)
    FakeChild.prepared = [
        [{"found": "a"}, {"error": "b"}, None, 1],
        [{"found": "c"}, None, 0],
    ]
    results = list(ask(question("must", "a", "b", "c"), time.monotonic() + 100))
    assert [(result.title, result.word, result.text) for result in results] == [
        ("made_up:a", "yes", "a"),
        ("made_up:b", "NO", "b"),
        ("made_up:c", "yes", "c"),
    ]


def test_what_has_no_time_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "SHORTEST_S", -1.0)
    monkeypatch.setattr(asking, "Child", FakeChild)
    FakeChild.prepared = [["silence"]]
    (cut,) = ask(question("must"), time.monotonic())
    assert cut.word == "NOT RUN" and "cut" in cut.text
    monkeypatch.setattr(asking, "SHORTEST_S", 20.0)
    (never_begun,) = ask(question("fact"), time.monotonic() + 10)
    assert never_begun.word == "NOT RUN" and not FakeChild.prepared


@pytest.mark.multiprocess
def test_a_process_that_cannot_answer_is_no_pass() -> None:
    (result,) = ask(question("must"), time.monotonic() + 100)  # no such title in the child
    assert result.word == "NO" and "KeyError" in result.text and "Traceback" in result.output


# --- the program ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["yes", "fact"], 0),
        (["yes", "skip"], 0),
        (["fact"], 0),
        (["skip"], 1),
        (["yes", "NO"], 1),
        (["yes", "NOT RUN"], 1),
        ([], 1),
    ],
)
def test_the_exit_status_is_honest(
    words: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [Result.of(case) for case in choose(["races"], [])][: len(words)]
    for result, word in zip(results, words, strict=True):
        result.end(word, "so")
        result.answered = word in ("yes", "fact")
    assert program.conclude(results) == status
    said = capsys.readouterr().out
    assert all(f"1 {word}" in said for word in words) and (words or "nothing to ask" in said)


def test_without_a_gpu_nothing_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_checks"])
    assert program.main() == 1
    assert "There is no GPU here" in capsys.readouterr().out


def test_what_a_case_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(program.SIMULATED_ENV, raising=False)
    (case,) = question("must", needs="no_such_package", simulated=())
    assert program.why_not(case) == "no_such_package is not installed"
    monkeypatch.setenv(program.SIMULATED_ENV, "1")
    assert "stands for a GPU" in program.why_not(case)

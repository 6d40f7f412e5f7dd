"""The worked example of docs/disaggregation.md is what its command prints."""

import re

from tests.helpers.documented import ROOT, fences, steps
from tests.unit.planner.models import run_plan

PAGE = ROOT / "docs" / "disaggregation.md"


def words(text: str) -> str:
    """Return the text without the lines of a table, one blank between words."""
    return " ".join(re.sub("[│┃]", " ", text).split())


def test_the_worked_example_is_what_the_command_prints() -> None:
    (step,) = (step for step in steps(PAGE) if "plan" in step.words)
    program, subcommand, *arguments = step.words
    assert (program, subcommand) == ("vllm-dwdp", "plan")
    shown = next(fence for fence in fences(PAGE) if fence.line > step.line)
    rows = shown.text.splitlines()
    ended = run_plan(*arguments)
    assert ended.returncode == 0, ended.stderr
    printed = words(ended.stdout)
    assert len(rows) > 8
    for row in rows:
        assert words(row) in printed, row
    started = re.search(r"(\d+) DWDP ranks feed them", printed)
    assert started and words(rows[-3]) == f"ranks to start, DWDP {started[1]} ranks"

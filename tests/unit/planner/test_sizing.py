"""The worked example of docs/disaggregation.md is what its command prints."""

import re
import shlex
from pathlib import Path

from tests.unit.planner.models import run_plan

PAGE = Path(__file__).parents[3] / "docs" / "disaggregation.md"


def words(text: str) -> str:
    """Return the text without the lines of a table, one blank between words."""
    return " ".join(re.sub("[│┃]", " ", text).split())


def test_the_worked_example_is_what_the_command_prints() -> None:
    section = PAGE.read_text().split("## How many ranks for a decode server")[1]
    command, _, *rows = section.split("```")[1].strip().splitlines()
    program, subcommand, *arguments = shlex.split(command)
    assert (program, subcommand) == ("vllm-dwdp", "plan")
    ended = run_plan(*arguments)
    assert ended.returncode == 0, ended.stderr
    printed = words(ended.stdout)
    assert len(rows) > 8
    for row in rows:
        assert words(row) in printed, row
    started = re.search(r"(\d+) DWDP ranks feed them", printed)
    assert started and words(rows[-3]) == f"ranks to start, DWDP {started[1]} ranks"

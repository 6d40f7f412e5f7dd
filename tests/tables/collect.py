"""Which tests there are, and which rows they carry; asked of pytest, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tables.record import ROOT
from tests.tables.rows import Row, rows_of

ANSWER = "DWDP_TABLES_ANSWER"
"""Names the file that this, as a plugin, writes."""
DEADLINE_S = 240


@dataclass(frozen=True)
class Collected:
    """All tests by id, and every row that one of them carries."""

    tests: frozenset[str]
    rows: tuple[Row, ...]


def collect(folder: Path, paths: Sequence[str] = ("tests",)) -> Collected:
    """Ask pytest for the tests of these paths.

    Args:
        folder: for what it answers.
    """
    answer = folder / "collected.json"
    environment = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
        + ["-p", __name__, *paths],
        cwd=ROOT,
        env=environment | {ANSWER: str(answer), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    found = json.loads(answer.read_text())
    return Collected(frozenset(found["tests"]), tuple(Row(**row) for row in found["rows"]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Write what was found."""
    rows = [row for item in session.items for row in rows_of(item.nodeid, item.iter_markers())]
    found = {
        "tests": [item.nodeid for item in session.items],
        "rows": [row.as_dict() for row in rows],
    }
    Path(os.environ[ANSWER]).write_text(json.dumps(found))

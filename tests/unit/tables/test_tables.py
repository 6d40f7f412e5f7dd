"""The tables in docs are what the tests carry and how they ended, and no row has stopped being true."""

from pathlib import Path

import pytest

from tests.tables.__main__ import DOCS, committed, tables
from tests.tables.collect import Collected, collect
from tests.tables.gpu import WAITS_FOR_A_GPU
from tests.tables.record import recorded, vllm_version
from tests.tables.render import entries

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Collected:
    return collect(tmp_path_factory.mktemp("tables"))


def test_the_tables_are_what_the_marks_and_the_results_say(collected: Collected) -> None:
    different = [
        name
        for name, text in tables(collected, committed()).items()
        if (DOCS / name).read_text() != text
    ]
    assert not different, "run `make tables`"


def test_no_row_has_stopped_being_true(collected: Collected) -> None:
    """Neither in the results that are committed nor in what ran on this machine last."""
    results = committed()
    here = recorded(vllm_version())["tests"]
    for table in ("feature", "model"):
        for entry in entries(collected.rows, table, results):
            assert "failed" not in entry.outcomes.values(), f"{entry.name}: {entry.places}"
    ended = {row.test: here.get(row.test, {}).get("outcome") for row in collected.rows}
    failed = [row.name for row in collected.rows if ended[row.test] == "failed"]
    assert not failed, "these rows failed when their tests ran last; run them again"


def test_a_row_that_does_not_work_is_not_said_to(collected: Collected) -> None:
    silent = {
        row.test
        for row in collected.rows
        if row.kind == "works" and ("refuse" in row.name.lower() or "does_not_serve" in row.test)
    }
    assert not silent, (
        'give refused="the sentence" or stock_fails="the error" to the mark, and the fixture `said` '
        "what was caught"
    )


def test_what_waits_for_a_gpu_is_a_check_that_the_documentation_knows() -> None:
    text = (Path(DOCS) / "gpu.md").read_text()
    missing = [check for check in WAITS_FOR_A_GPU.values() if check not in text]
    assert not missing

"""The fixture `said`: the sentence of a row is the one that its test has seen."""

from collections.abc import Generator, Iterator

import pytest

from tests.tables.rows import plain, rows_of

OUTCOME = pytest.StashKey[str]()


class Said:
    """Looks for the sentences of a test's rows in what the test caught."""

    def __init__(self, sentences: list[str]) -> None:
        self._sentences = sentences
        self.is_asked = False

    def __call__(self, text: object) -> None:
        """Assert that `text`, an error or what was printed, has every sentence."""
        self.is_asked = True
        assert self._sentences, "the test carries no row with refused=... or stock_fails=..."
        for sentence in self._sentences:
            found = plain(str(text))
            assert plain(sentence) in found, f"{sentence!r} is not in {found!r}"


def sentences_of(item: pytest.Item) -> list[str]:
    """Return the sentences of the rows that a test carries."""
    return [row.sentence for row in rows_of(item.nodeid, item.iter_markers()) if row.sentence]


@pytest.fixture
def said(request: pytest.FixtureRequest) -> Iterator[Said]:
    """Call it with what was caught; a test that passes without is an error."""
    made = Said(sentences_of(request.node))
    yield made
    has_passed = request.node.stash[OUTCOME] == "passed"
    assert made.is_asked or not has_passed, "nobody looked for the sentence of the row"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note how the last phase of a test ended."""
    report = yield
    item.stash[OUTCOME] = report.outcome
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a row whose sentence nobody looks for."""
    if sentences_of(item) and "said" not in getattr(item, "fixturenames", ()):
        pytest.fail("a row with refused=... or stock_fails=... needs the fixture `said`", False)

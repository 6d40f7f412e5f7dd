"""Rows of the tables, as tests carry them."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

TABLES = ("feature", "model")
SENTENCES = ("refused", "stock_fails")


@dataclass(frozen=True)
class Row:
    """What one test says of one row.

    Args:
        table: `feature` or `model`.
        name: of the row, as the table shows it.
        test: the id of the test.
        kind: `works`, `refused` or `stock_fails`.
        sentence: what is said instead, which the test looks for; empty for `works`.
    """

    table: str
    name: str
    test: str
    kind: str = "works"
    sentence: str = ""

    def as_dict(self) -> dict[str, str]:
        """Convert to JSON."""
        return asdict(self)

    @property
    def place(self) -> str:
        """The file and the function of the test, without parameters."""
        return self.test.partition("[")[0]


def rows_of(test: str, marks: Iterable[Any]) -> Iterator[Row]:
    """Yield the rows that the marks of a test make true.

    Raises:
        ValueError: a mark has no row, or says something else.
    """
    for mark in marks:
        if mark.name not in TABLES:
            continue
        kinds = set(mark.kwargs)
        if not mark.args or len(kinds) > 1 or not kinds <= set(SENTENCES):
            raise ValueError(f"{test}: {mark} is no row and at most one of {', '.join(SENTENCES)}")
        kind = next(iter(kinds), "works")
        for name in mark.args:
            yield Row(mark.name, name, test, kind, mark.kwargs.get(kind, ""))


def plain(text: str) -> str:
    """Return a text with every run of blanks and line ends as one blank, to look for sentences in."""
    return " ".join(text.split())

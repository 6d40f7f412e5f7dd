"""The one console of the commands: tables, sentences and JSON on standard output."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console(markup=False, emoji=False)
"""Prints what ranks and users wrote as it is: `[/models/x]` is a path."""


def table(title: str, headings: Iterable[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """Make a table; strings as they are, whatever brackets they hold."""
    made = Table(title=Text(title, style="table.title"))
    for heading in headings:
        made.add_column(Text(heading), overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def show(title: str, headings: Iterable[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """Print a table, as `table` makes it."""
    console.print(table(title, headings, rows))


def say(*sentences: str) -> None:
    """Print sentences, as they are."""
    for sentence in sentences:
        console.print(sentence, soft_wrap=True)


def print_json(content: Any) -> None:
    """Print what scripts read instead of tables."""
    print(json.dumps(content, indent=1))


def progress(sentence: str) -> None:
    """Print a sentence to standard error, so that standard output stays what was asked for."""
    print(sentence, file=sys.stderr, flush=True)


def text(value: object) -> str:
    """Format a cell."""
    return figure(value) if isinstance(value, float) else str(value)


def figure(value: float) -> str:
    """Format a number with four digits, or all of a large one."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

"""Tables and numbers on the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console()


def show(title: str, headings: Iterable[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """Print a table; strings as they are, whatever brackets they hold."""
    table = Table(title=Text(title, style="table.title"))
    for heading in headings:
        table.add_column(Text(heading), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console.print(table)


def say(*sentences: str) -> None:
    """Print sentences, as they are."""
    for sentence in sentences:
        console.print(sentence, soft_wrap=True, markup=False)


def text(value: object) -> str:
    """A cell."""
    return figure(value) if isinstance(value, float) else str(value)


def figure(value: float) -> str:
    """A number with four digits, or all of a large one."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

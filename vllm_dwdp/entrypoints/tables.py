"""Tables and numbers on the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from vllm_dwdp.planner.estimates import ANY_STEP

console = Console()


def show(title: str, headings: Iterable[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def text(value: object) -> str:
    """A cell."""
    return figure(value) if isinstance(value, float) else str(value)


def figure(value: float) -> str:
    """A number with four digits, or all of a large one."""
    if value >= ANY_STEP:
        return "any"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

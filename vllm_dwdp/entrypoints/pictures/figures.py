"""What a picture shows: curves or bars, and the message above them. Pure; `draw` draws them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

COLOURS = ("#1f6feb", "#d1495b", "#2e933c", "#edae49", "#6c757d")


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Curves over one axis.

    Args:
        title: the message, in a sentence.
        x_label, y_label: with units.
        series: points of each curve, by name.
        marks: vertical lines, by label.
        level: a horizontal line.
        log_x: for sizes that double.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    marks: Mapping[str, float] = field(default_factory=dict)
    level: float | None = None
    log_x: bool = False


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One value, and its spread if it has one; `group` chooses the colour."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Values side by side, the first on top.

    Args:
        title: the message, in a sentence.
        x_label: with unit.
        bars: from top to bottom.
        reference: where bars begin, and a line is drawn.
        band: a range that is shaded, e.g. a tolerance.
        log_x: for ratios, of which 1/2 is as far from 1 as 2.
    """

    title: str
    x_label: str
    bars: Sequence[Bar]
    reference: float = 0.0
    band: tuple[float, float] | None = None
    log_x: bool = False

    @property
    def colours(self) -> dict[str, str]:
        """The colour of each group."""
        groups = dict.fromkeys(bar.group for bar in self.bars)
        return {group: COLOURS[index % len(COLOURS)] for index, group in enumerate(groups)}


Picture = Lines | Bars

"""Pictures of what the commands print: what is in them and where they go. Drawn by `pictures_draw`."""

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_dwdp.errors import DwdpConfigError

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
        """Of each group."""
        groups = dict.fromkeys(bar.group for bar in self.bars)
        return {group: COLOURS[index % len(COLOURS)] for index, group in enumerate(groups)}


Picture = Lines | Bars


class Pictures:
    """Where pictures go; refuses at once what could not be written at the end.

    Raises:
        DwdpConfigError: the library is not installed, or the file cannot be written.
    """

    def __init__(self, *, html: Path | None, png: Path | None) -> None:
        self._html, self._png = html, png
        for option, path, library in (("--html", html, "plotly"), ("--png", png, "matplotlib")):
            if path is None:
                continue
            if importlib.util.find_spec(library) is None:
                raise DwdpConfigError(
                    f"{option} needs {library}, which is not installed: pip install "
                    "'vllm-dwdp[plots]'."
                )
            check_writable(option, path)

    def write(self, draw: Callable[[], Sequence[Picture]]) -> None:
        """Draw and write what was asked for.

        Raises:
            DwdpConfigError: a file cannot be written after all.
        """
        from vllm_dwdp.entrypoints.pictures.draw import write_html, write_png

        for option, path, write in (
            ("--html", self._html, write_html),
            ("--png", self._png, write_png),
        ):
            if path is not None:
                with refusing(option, path):
                    write(draw(), path)


def check_writable(option: str, path: Path) -> None:
    """Refuse a file that could not be written, before an hour of work.

    Raises:
        DwdpConfigError: its folder is missing or may not be written, or it is a folder itself.
    """
    with refusing(option, path):
        is_new = not path.exists()
        with path.open("a"):
            pass
        if is_new:
            path.unlink()


@contextmanager
def refusing(option: str, path: Path) -> Iterator[None]:
    """Says in a line that a file cannot be written.

    Raises:
        DwdpConfigError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise DwdpConfigError(
            f"{option} {path} cannot be written ({error.strerror}): give a file in a writable folder."
        ) from error


def write_json(option: str, path: Path, content: Any) -> None:
    """Write a result file.

    Raises:
        DwdpConfigError: the path cannot be written.
    """
    with refusing(option, path):
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

"""Draws pictures by matplotlib into a PNG.

matplotlib is optional (the extra `plots`) and imported only when a picture is asked for.
"""

import importlib.util
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_dwdp.entrypoints.files import check_writable, refusing
from vllm_dwdp.entrypoints.pictures.figures import COLOURS, Bars, Lines, Picture
from vllm_dwdp.errors import DwdpConfigError

_WIDTH_INCHES, _HEIGHT_INCHES, _HEIGHT_PER_BAR = 8.0, 4.2, 0.3
_TITLE_WIDTH = 84


class PngFile:
    """Where pictures go, if anywhere; refuses at once what could not be written at the end.

    Args:
        path: None draws nothing.

    Raises:
        DwdpConfigError: matplotlib is not installed, or the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is None:
            return
        if importlib.util.find_spec("matplotlib") is None:
            raise DwdpConfigError(
                "--png needs matplotlib, which is not installed: pip install 'vllm-dwdp[plots]'."
            )
        check_writable("--png", path)

    def write(self, make: Callable[[], Sequence[Picture]]) -> None:
        """Make the pictures and draw them, if they were asked for.

        Raises:
            DwdpConfigError: the file cannot be written after all.
        """
        if self._path is not None:
            with refusing("--png", self._path):
                write_png(make(), self._path)


def write_png(pictures: Sequence[Picture], path: Path) -> None:
    """Draw all pictures, one below the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [_height(picture) for picture in pictures]
    figure = pyplot.figure(figsize=(_WIDTH_INCHES, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(pictures), 1, height_ratios=heights, squeeze=False)
    for picture, (part,) in zip(pictures, parts, strict=True):
        title = textwrap.fill(picture.title, _TITLE_WIDTH)
        part.suptitle(title, x=0.01, ha="left", size=11, weight="bold")
        axes = part.subplots()
        # Long labels of bars leave narrow axes; to the right there is no room.
        axes.set_xlabel(picture.x_label, size=10, loc="right")
        axes.spines[["top", "right"]].set_visible(False)
        if isinstance(picture, Lines):
            _draw_lines(axes, picture)
        else:
            _draw_bars(axes, picture)
            _legend(part, picture)
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)


def _height(picture: Picture) -> float:
    if isinstance(picture, Lines):
        return _HEIGHT_INCHES
    return 1.4 + _HEIGHT_PER_BAR * len(picture.bars)


def _draw_lines(axes: Any, picture: Lines) -> None:
    for colour, (name, (xs, ys)) in zip(COLOURS, picture.series.items(), strict=False):
        axes.plot(xs, ys, label=name, color=colour, linewidth=2)
    axes.set_ylim(bottom=0)
    for place, (label, x) in enumerate(picture.marks.items()):
        axes.axvline(x, color="#6c757d", linestyle="--", linewidth=1)
        # Labels stand below each other, so that near marks stay legible.
        axes.annotate(
            f"{label}",
            (x, 0),
            xytext=(-4, 6 + 16 * place),
            textcoords="offset points",
            ha="right",
            size=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    if picture.level is not None:
        axes.axhline(picture.level, color="#24292f", linewidth=1)
    if picture.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}")
    axes.set_ylabel(picture.y_label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _draw_bars(axes: Any, picture: Bars) -> None:
    if picture.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}")
    if picture.band is not None:
        axes.axvspan(*picture.band, color="#2e933c", alpha=0.12, linewidth=0)
    for place, bar in enumerate(picture.bars):
        colour = picture.colours[bar.group]
        width = bar.value - picture.reference
        axes.barh(place, width, left=picture.reference, color=colour, height=0.66)
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [place, place], color="#24292f", linewidth=1.6)
        outer = max(bar.value, bar.high if bar.high is not None else bar.value, picture.reference)
        axes.annotate(
            f"{bar.value:.3g}",
            (outer, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.axvline(picture.reference, color="#24292f", linewidth=1)
    axes.set_yticks(range(len(picture.bars)), [bar.label for bar in picture.bars])
    axes.set_ylim(len(picture.bars) - 0.4, -0.6)
    axes.margins(x=0.12)


def _legend(part: Any, picture: Bars) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=colour, label=group) for group, colour in picture.colours.items() if group
    ]
    if len(handles) > 1:
        part.legend(handles=handles, frameon=False, loc="outside lower right", ncols=len(handles))

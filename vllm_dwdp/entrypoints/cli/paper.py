"""`vllm-dwdp paper`: every published figure beside the model's, and what was fitted."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.text import Text

from vllm_dwdp import paper as published
from vllm_dwdp.entrypoints.cli.options import AsJson, Png
from vllm_dwdp.entrypoints.pictures.draw import PngFile
from vllm_dwdp.entrypoints.pictures.planner import chunk_picture, paper_pictures
from vllm_dwdp.entrypoints.tables import print_json, say, show


def paper(as_json: AsJson = False, png: Png = None) -> None:
    """Show every published figure beside the model's, what was fitted, and why a figure is missed."""
    picture, rows = PngFile(png), published.paper_rows()
    chunks = list(published.chunk_rows())
    picture.write(lambda: [*paper_pictures(rows), chunk_picture()])
    if as_json:
        print_json(_content(rows, chunks))
        return
    headings = ("source", "quantity", "published", "model", "error", "kind")
    show("published figures and the model's", headings, [_shown(row) for row in rows])
    factors = [
        (name, f"{factor.value:g}", factor.meaning, "\n".join(factor.rows))
        for name, factor in published.FITTED.items()
    ]
    show("fitted factors", ("factor", "value", "meaning", "fitted on"), factors)
    say(_summary(rows), "Missed:")
    for row in rows:
        if not row.is_reached:
            say(f"- {row.source}, {row.quantity}: {published.why_missed(row)}")
    show("another machine, not counted", headings, [_shown(row) for row in chunks])
    say("Differences:", *(f"- {sentence}" for sentence in published.DIFFERENCES))
    say("Not modelled:", *(f"- {what}: {why}" for what, why in published.NOT_MODELLED))


def _content(rows: Sequence[published.Row], chunks: Sequence[published.Row]) -> dict[str, Any]:
    """Convert to JSON."""
    return {
        "rows": [row.as_dict() for row in rows],
        "fitted": {name: asdict(factor) for name, factor in published.FITTED.items()},
        "missed": [
            {"source": row.source, "quantity": row.quantity, "reason": published.why_missed(row)}
            for row in rows
            if not row.is_reached
        ],
        "chunk_curve": [row.as_dict() for row in chunks],
        "differences": published.DIFFERENCES,
        "not_modelled": [{"source": what, "reason": why} for what, why in published.NOT_MODELLED],
    }


def _shown(row: published.Row) -> tuple[str | Text, ...]:
    error = Text(f"{100 * row.error:+.1f} %", style="green" if row.is_reached else "red")
    return row.source, row.quantity, f"{row.published:g}", f"{row.model:.4g}", error, row.kind


def _summary(rows: Sequence[published.Row]) -> str:
    within = sum(row.is_reached for row in rows)
    return (
        f"{within} of {len(rows)} rows ({100 * within / len(rows):.0f} %) are within "
        f"{100 * published.TOLERANCE:.0f} %; with the figures that are not modelled, {within} of "
        f"{published.NUM_PUBLISHED} ({100 * within / published.NUM_PUBLISHED:.0f} %). By kind: "
        f"{_by_kind(rows)}."
    )


def _by_kind(rows: Sequence[published.Row]) -> str:
    kinds = dict.fromkeys(row.kind for row in rows)
    return ", ".join(
        f"{kind} {sum(row.is_reached for row in rows if row.kind == kind)} of "
        f"{sum(row.kind == kind for row in rows)}"
        for kind in kinds
    )

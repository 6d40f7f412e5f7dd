"""`vllm-dwdp simulate --paper`: every published figure beside the model's, and what was fitted."""

import json
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from vllm_dwdp import paper
from vllm_dwdp.entrypoints.pictures.figures import Pictures
from vllm_dwdp.entrypoints.tables import say, show


def show_paper(pictures: Pictures, as_json: bool) -> None:
    """Print all rows, the fitted factors, and what is missed or missing, and why."""
    from vllm_dwdp.entrypoints.pictures.planner import paper_pictures

    rows = paper.paper_rows()
    pictures.write(lambda: paper_pictures(rows))
    if as_json:
        print(json.dumps(_content(rows), indent=1))
        return
    headings = ("source", "quantity", "published", "model", "error", "kind")
    show("published figures and the model's", headings, [_shown(row) for row in rows])
    factors = [
        (name, f"{factor.value:g}", factor.meaning, "\n".join(factor.rows))
        for name, factor in paper.FITTED.items()
    ]
    show("fitted factors", ("factor", "value", "meaning", "fitted on"), factors)
    say(_summary(rows), "Missed:")
    for row in rows:
        if not row.is_reached:
            say(f"- {row.source}, {row.quantity}: {paper.why_missed(row)}")
    say("Not modelled:", *(f"- {what}: {why}" for what, why in paper.NOT_MODELLED))


def _content(rows: Sequence[paper.Row]) -> dict[str, Any]:
    """For JSON."""
    return {
        "rows": [row.as_dict() for row in rows],
        "fitted": {
            name: {"value": factor.value, "rows": factor.rows, "meaning": factor.meaning}
            for name, factor in paper.FITTED.items()
        },
        "missed": [
            {"source": row.source, "quantity": row.quantity, "reason": paper.why_missed(row)}
            for row in rows
            if not row.is_reached
        ],
        "not_modelled": [{"source": what, "reason": why} for what, why in paper.NOT_MODELLED],
    }


def _shown(row: paper.Row) -> tuple[str | Text, ...]:
    error = Text(f"{100 * row.error:+.1f} %", style="green" if row.is_reached else "red")
    return row.source, row.quantity, f"{row.published:g}", f"{row.model:.4g}", error, row.kind


def _summary(rows: Sequence[paper.Row]) -> str:
    within = sum(row.is_reached for row in rows)
    return (
        f"{within} of {len(rows)} rows ({100 * within / len(rows):.0f} %) are within "
        f"{100 * paper.TOLERANCE:.0f} %; with the figures that are not modelled, {within} of "
        f"{paper.NUM_PUBLISHED} ({100 * within / paper.NUM_PUBLISHED:.0f} %). By kind: "
        f"{_by_kind(rows)}."
    )


def _by_kind(rows: Sequence[paper.Row]) -> str:
    kinds = dict.fromkeys(row.kind for row in rows)
    return ", ".join(
        f"{kind} {sum(row.is_reached for row in rows if row.kind == kind)} of "
        f"{sum(row.kind == kind for row in rows)}"
        for kind in kinds
    )

"""The Grafana board has the fields that Grafana's own model of a dashboard has, and no others.

Grafana itself is in none of the package registries. Its published model is (grafana-foundation-sdk);
a field that it does not know is lost when the board is read into it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import choose_encoder

BOARD = Path(__file__).parents[2] / "examples" / "deploy" / "grafana.json"


def through_the_model(board: dict[str, Any]) -> dict[str, Any]:
    """Return the board as Grafana's model keeps it."""
    pytest.importorskip("grafana_foundation_sdk", reason="the extra `dev` has it")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    kept: dict[str, Any] = json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))
    return kept


def differences(ours: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Places of `ours` that are not in `kept`."""
    if isinstance(ours, dict):
        for key, value in ours.items():
            if key in kept:
                yield from differences(value, kept[key], f"{path}/{key}")
            else:
                yield f"{path}/{key}"
    elif isinstance(ours, list):
        for number, (mine, theirs) in enumerate(zip(ours, kept, strict=True)):
            yield from differences(mine, theirs, f"{path}/{number}")
    elif ours != kept:
        yield path


def panels() -> list[dict[str, Any]]:
    """All panels but rows."""
    listed = json.loads(BOARD.read_text())["panels"]
    inside = [each for row in listed for each in row.get("panels", ())]
    return [each for each in listed + inside if each["type"] != "row"]


def test_grafanas_model_knows_every_field() -> None:
    board = json.loads(BOARD.read_text())
    assert [*differences(board, through_the_model(board))] == []


def test_a_field_that_grafana_does_not_know_is_found() -> None:
    board = json.loads(BOARD.read_text())
    board["panels"][0]["targets"][0]["exprs"] = ""
    assert [*differences(board, through_the_model(board))] == ["/panels/0/targets/0/exprs"]


def test_panels_have_their_own_place_and_number() -> None:
    board = json.loads(BOARD.read_text())
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_every_panel_asks_the_chosen_source() -> None:
    (variable,) = json.loads(BOARD.read_text())["templating"]["list"]
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": f"${{{variable['name']}}}"}
        names = [target["refId"] for target in panel["targets"]]
        assert names and len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("accepted", "name"),
    [
        ("text/plain;version=0.0.4", "vllm:dwdp_x"),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8", "vllm:dwdp_x"),
        ("application/openmetrics-text;version=1.0.0", "vllm_dwdp_x"),
    ],
    ids=["text", "Prometheus 3", "Prometheus 2"],
)
def test_who_reads_the_names_with_their_colon(accepted: str, name: str) -> None:
    """Docs say so; the day that the last line fails, the advice about Prometheus 2 can go."""
    registry = CollectorRegistry()
    Gauge("vllm:dwdp_x", "", registry=registry).set(1)
    encode, _ = choose_encoder(accepted)
    assert f"\n{name} 1.0" in encode(registry).decode()

"""The metrics that the dashboard and the guides name."""

import importlib.util
import json
import re
from pathlib import Path

from tests.unit.examples.deployments import DEPLOY
from vllm_dwdp.compat.frontend import metrics
from vllm_dwdp.entrypoints.launch import pairing


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = re.findall(r"vllm:dwdp_\w+", json.dumps(dashboard))
    made = metrics.RankMetrics("m")
    known = set()
    for value in vars(made).values():
        for metric in value.values() if isinstance(value, dict) else [value]:
            described = getattr(metric, "describe", lambda: [])()
            for family in described:
                total = "_total" if family.type == "counter" else ""
                known.add(family.name + total)
    assert asked
    assert set(asked) <= known


def test_metrics_of_kv_transfers_are_vllms() -> None:
    """Read from vLLM's files: importing them takes seconds."""
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None and vllm.submodule_search_locations
    folder = Path(vllm.submodule_search_locations[0])
    connector = folder / "distributed/kv_transfer/kv_connector/v1/nixl/stats.py"
    known = {*re.findall(r"name=\"(vllm:nixl_\w+)\"", connector.read_text())}
    guide = Path(__file__).parents[3] / "docs" / "disaggregation.md"
    texts = [(DEPLOY / "grafana.json").read_text(), guide.read_text(), pairing.RECEIVED]
    for text in texts:
        asked = re.findall(r"vllm:nixl_\w+", text)
        assert asked
        assert {re.sub("_(total|sum|bucket)$", "", name) for name in asked} <= known
    assert f'"{pairing.CACHE_INFO}"' in (folder / "v1/metrics/loggers.py").read_text()

"""The costs of a start.

Only the resident experts are read, no more than one layer is held twice, and two ranks take less of
everything than two stock servers.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Checkpoints
from tests.e2e.matrix import run_cases

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

NUM_LAYERS, NUM_EXPERTS, HIDDEN, INTERMEDIATE = 6, 16, 512, 1024
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * 2
LAYER_BYTES = NUM_EXPERTS * EXPERT_BYTES
SHAPE = {"hidden_size": HIDDEN, "num_hidden_layers": NUM_LAYERS, "intermediate_size": INTERMEDIATE}
SLACK = 0.1  # pages that the kernel maps around the ones that were touched
ENGINE_BYTES = 64 * 2**20  # what an engine takes beside weights while it is built; sampled


@pytest.fixture(scope="module")
def measured(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Rank 0 of 2 loads, waits a moment for a peer that never comes, and reports what it cost.

    The loader maps the checkpoint, so the pages of it that were read are those in the process.
    """
    folder = tmp_path_factory.mktemp("cost")
    common = {"num_ranks": 2, "dwdp": {"join_timeout_s": 0.5}, "fails": True}
    layers = ["full_attention"] * NUM_LAYERS
    models = {
        "per-expert": checkpoints("mixtral", NUM_EXPERTS, **SHAPE),
        "fused": checkpoints("gpt_oss", NUM_EXPERTS, layer_types=layers, **SHAPE),
    }
    warm_up = common | {"name": "warm-up", "model": checkpoints("mixtral", 8)}
    measured = {}
    for name, model in models.items():
        # A process of its own: what one engine leaves in the heap is memory the next one need not take.
        cases = [warm_up, common | {"name": name, "model": model}]
        (measured[name],) = run_cases(folder, name, cases, only_rank=0)[name]
        (weights,) = Path(model).glob("*.safetensors")
        measured[name]["file_bytes"] = weights.stat().st_size
    return measured


@pytest.mark.parametrize("kind", ["per-expert", "fused"])
def test_only_resident_experts_are_read(measured: dict[str, dict[str, Any]], kind: str) -> None:
    result = measured[kind]
    assert "did not publish their experts" in result["error"]
    experts = NUM_LAYERS * LAYER_BYTES
    dense = result["file_bytes"] - experts
    assert 0 < dense < 0.2 * experts
    read_bytes = result["peak_bytes"]["file"]
    assert 0.9 * experts / 2 <= read_bytes <= (1 + SLACK) * (experts / 2 + dense)


@pytest.mark.parametrize("kind", ["per-expert", "fused"])
def test_peak_memory_is_resident_experts_dense_and_one_layer_twice(
    measured: dict[str, dict[str, Any]], kind: str
) -> None:
    """One layer is whole while it is processed, and vLLM packs it into other memory."""
    result = measured[kind]
    experts = NUM_LAYERS * LAYER_BYTES
    dense = result["file_bytes"] - experts
    assert experts / 2 <= result["peak_bytes"]["own"]
    assert result["peak_bytes"]["own"] <= experts / 2 + dense + 2 * LAYER_BYTES + ENGINE_BYTES


@pytest.mark.slow
def test_two_ranks_start_for_no_more_than_two_stock_servers(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Processes, memory and CPU seconds; time on the clock is for an idle machine."""
    path = Path(__file__).parents[2] / "benchmarks" / "start_time.py"
    spec = importlib.util.spec_from_file_location("start_time", path)
    assert spec is not None and spec.loader is not None
    start_time = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(start_time)
    arguments = [checkpoints("qwen3_moe", 8), "--enforce-eager"]
    started = {kind: start_time.start_once(kind, arguments, tmp_path) for kind in ("stock", "dwdp")}
    ours, stock = started["dwdp"], started["stock"]
    assert ours.num_processes < stock.num_processes, started
    assert ours.memory_mib <= stock.memory_mib, started
    assert ours.cpu_s <= 1.05 * stock.cpu_s, started
    assert ours.shared_memory_mib < 1, started
    phases = ["front end", "engine", "worker", "load", "meeting", "cache and warm-up"]
    assert list(ours.phases) == phases and "meeting" not in stock.phases

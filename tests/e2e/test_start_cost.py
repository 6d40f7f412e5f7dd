"""What a start costs: only the resident experts are read from disk, and no layer is held whole."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e import page_cache
from tests.e2e.conftest import Checkpoints
from tests.e2e.matrix import run_cases

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

NUM_LAYERS, NUM_EXPERTS, HIDDEN, INTERMEDIATE = 4, 8, 1024, 2048
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * 2
LAYER_BYTES = NUM_EXPERTS * EXPERT_BYTES
SHAPE = {"hidden_size": HIDDEN, "num_hidden_layers": NUM_LAYERS, "intermediate_size": INTERMEDIATE}
READ_AHEAD = 0.25  # the kernel reads on past each run of experts, up to 8 MiB on some disks
ALLOCATOR = 0.1


@pytest.fixture(scope="module")
def measured(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Rank 0 of 2 loads, waits a moment for a peer that never comes, and reports what it cost."""
    folder = tmp_path_factory.mktemp("cost")
    common = {"num_ranks": 2, "dwdp": {"join_timeout_s": 0.5}, "fails": True}
    models = {
        "per-expert": checkpoints("mixtral", NUM_EXPERTS, **SHAPE),
        "fused": checkpoints(
            "gpt_oss", NUM_EXPERTS, layer_types=["full_attention"] * NUM_LAYERS, **SHAPE
        ),
    }
    warm_up = common | {"name": "warm-up", "model": checkpoints("mixtral", 8)}
    cases = [common | {"name": name, "model": model} for name, model in models.items()]
    for model in models.values():
        page_cache.drop(weights_of(model))
        assert page_cache.cached_bytes(weights_of(model)) < LAYER_BYTES, "the cache was not emptied"
    results = run_cases(folder, "cost", [warm_up, *cases], only_rank=0)
    return {
        name: results[name][0]
        | {
            "read_bytes": page_cache.cached_bytes(weights_of(model)),
            "file_bytes": weights_of(model).stat().st_size,
        }
        for name, model in models.items()
    }


def weights_of(model: str) -> Path:
    (path,) = Path(model).glob("*.safetensors")
    return path


@pytest.mark.parametrize("kind", ["per-expert", "fused"])
def test_only_resident_experts_are_read(measured: dict[str, dict[str, Any]], kind: str) -> None:
    result = measured[kind]
    assert "did not publish their experts" in result["error"]
    experts = NUM_LAYERS * LAYER_BYTES
    dense = result["file_bytes"] - experts
    assert 0 < dense < 0.2 * experts
    assert experts / 2 <= result["read_bytes"] <= (1 + READ_AHEAD) * (experts / 2 + dense)


@pytest.mark.parametrize("kind", ["per-expert", "fused"])
def test_peak_memory_is_resident_experts_dense_and_one_layer(
    measured: dict[str, dict[str, Any]], kind: str
) -> None:
    result = measured[kind]
    experts = NUM_LAYERS * LAYER_BYTES
    dense = result["file_bytes"] - experts
    assert experts / 2 <= result["peak_bytes"]
    assert result["peak_bytes"] <= (1 + ALLOCATOR) * (experts / 2 + dense + LAYER_BYTES)

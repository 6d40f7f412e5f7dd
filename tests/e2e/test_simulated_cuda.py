"""Real engines on CPU kernels, whose expert memory is the CUDA device's over the fake driver.

No evidence about hardware: what runs here is `device.cuda`, the handles between processes (hundreds of
descriptors), edges at 2 MiB pages, pooled slots, the copy queue's order, both views of `auto`.
"""

from pathlib import Path
from typing import Any

import pytest

from gpu_checks.fake import fake_cuda_environment
from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.matrix import run_cases
from vllm_dwdp.prefetch.mode_policy import MOST_DIRECT_TOKENS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# Experts of 2.75 and 1.375 MiB: several pages each, and most end within one.
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3}
SIMULATED = {
    "replace": [
        "vllm_dwdp.executor.cpu_worker:DwdpCPUWorker.make_device",
        "tests.e2e.engine_process:make_simulated_device",
    ]
}


@pytest.mark.feature("The CUDA device, over a simulated driver")
def test_tokens_and_weights_over_simulated_device_memory(
    stock: StockEngine, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    model = checkpoints("mixtral", 8, **SHAPE)
    biased = checkpoints("gpt_oss", 7, **SHAPE)
    reference = {"mixtral": stock(model), "gpt_oss": stock(biased)}
    common = {"num_ranks": 3} | SIMULATED
    limit = {"mode": "auto", "direct_max_tokens": 8}
    redundant = {"mode": "prefetch", "experts_per_rank": 4}
    listed: list[dict[str, Any]] = [
        common | {"name": "mixtral@direct", "model": model, "dwdp": {"mode": "direct"}},
        common | {"name": "mixtral@redundant", "model": model, "dwdp": redundant},
        common
        | {"name": "gpt_oss@auto", "model": biased, "dwdp": limit}
        | {"report": f"{__name__}:bytes_of_fills"},
        common | {"name": "mixtral@auto_default", "model": model, "dwdp": {"mode": "auto"}},
    ]
    races = {"DWDP_DEBUG_POISON": "1", "DWDP_DEBUG_MAX_DELAY_US": "1000"}
    environment = fake_cuda_environment() | races
    results = run_cases(tmp_path, "simulated", listed, environment)
    for name, ranks in results.items():
        expected = reference[name.partition("@")[0]]
        assert len(ranks) == 3
        for result in ranks:
            assert result["weights"] == expected["weights"], (name, result["rank"])
            assert result["tokens"] == expected["tokens"], (name, result["rank"])
            assert result["status"]["remote_expert_bytes"] > 0
            assert result["status"]["mappings"]["peer_allocations"] > 0
            check_start(name, result["status"])
            assert not any(result["cuda_left"].values()), (name, result["cuda_left"])
    # Whatever was measured here: one limit, below every step that hides its copies.
    by_default = [result["status"] for result in results["mixtral@auto_default"]]
    assert len({status["direct_max_tokens"] for status in by_default}) == 1
    for status in by_default:
        limit, hidden_from = status["direct_max_tokens"], status["break_even_tokens"]
        assert 0 <= limit < hidden_from, status
        assert limit <= MOST_DIRECT_TOKENS and "group's cost model" in status["policy"]
        assert status["slot_bytes"] > 0
        assert (status["steps"].get("direct", 0) > 0) == (limit > 0)
        assert (sum(status["fetched_bytes"].values()) > 0) == (status["steps"]["prefetch"] > 0)
        assert status["steps"]["prefetch"] > 0 or limit > 0
    for result in results["gpt_oss@auto"]:
        steps = result["status"]["steps"]
        assert steps["direct"] > 10 and steps["prefetch"] > 2, steps
        # A forward fetches when it runs in prefetch mode, and never when it reads in place.
        fetched = sum(result["status"]["fetched_bytes"].values())
        assert fetched == result["first"] + steps["prefetch"] * result["per_forward"] > 0


def check_start(name: str, status: dict[str, Any]) -> None:
    """Check that a rank digests its shard once: resident experts, and the rest of their large pages."""
    resident_bytes = status["resident_expert_bytes"]
    assert resident_bytes <= status["digested_bytes"] < 3 * resident_bytes, (name, status)
    assert status["read_expert_bytes"] > 0.9 * resident_bytes, (name, status)
    seconds = status["start_seconds"]
    assert all(seconds[phase] > 0 for phase in ("load", "meet", "digest", "map")), seconds
    assert (seconds["measure"] > 0.02) == (not name.endswith("direct")), (name, seconds)


def bytes_of_fills(worker: Any) -> dict[str, int]:
    """Report what the first fills of a ring of three layers copy, and what each forward does.

    Layers 0 and 2 share a slot and are fetched anew every time; layer 1 stays in its own.
    """
    (ring,) = worker.expert_group.views.rings.rings
    bytes_of = [sum(ring.layer_bytes(layer).values()) for layer in range(3)]
    return {"first": bytes_of[0] + bytes_of[1], "per_forward": bytes_of[0] + bytes_of[2]}

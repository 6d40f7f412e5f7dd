"""Prompts that DWDP ranks computed, decoded by a stock engine: the tokens are one stock engine's.

Engines only, without servers and router (`test_disaggregated` has these): so every family costs
seconds. Expert bytes came to each rank, and KV bytes to the decode engine.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.engine_process import PROMPTS
from tests.e2e.matrix import run_cases
from vllm_dwdp.entrypoints.launch.ports import free_ports_in_a_row

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed"),
]


class OtherTokens(AssertionError):
    """All bytes came, and the answer is another."""


WRONG_ON_CPUS = pytest.mark.xfail(
    reason="vLLM's CPU_MLA backend decodes fetched blocks wrongly; `check_pair` refuses it",
    strict=True,
    raises=OtherTokens,
)
ROW = pytest.mark.feature("Disaggregated serving (NIXL): several model families")
NUM_PROCESSES = 3
"""Two ranks and the decode engine."""


@pytest.mark.parametrize(
    "families",
    [
        pytest.param(["qwen3_moe"], id="one-family", marks=ROW),
        pytest.param(["mixtral", "gpt_oss"], id="others", marks=[pytest.mark.slow, ROW]),
        pytest.param(["deepseek_v3"], id="mla", marks=[pytest.mark.slow, WRONG_ON_CPUS]),
    ],
)
def test_a_stock_engine_decodes_what_ranks_computed(
    stock: StockEngine, checkpoints: Checkpoints, tmp_path: Path, families: list[str]
) -> None:
    models = {family: checkpoints(family) for family in families}
    cases: list[dict[str, Any]] = [
        {
            "name": family,
            "model": model,
            "num_ranks": NUM_PROCESSES,
            "side_channel_port": free_ports_in_a_row(NUM_PROCESSES),
        }
        for family, model in models.items()
    ]
    expected = stock.all([*models.values()])
    found = run_cases(tmp_path, "all", cases, program="tests.e2e.disaggregated_engines")
    for family, model in models.items():
        *ranks, decode = found[family]
        assert decode["failed"] == []
        assert len(decode["received_kv_bytes"]) == len(PROMPTS) and min(decode["received_kv_bytes"])
        assert all(rank["fetched_expert_bytes"] > 0 for rank in ranks), f"{family}: no DWDP"
        if decode["tokens"] != expected[model]["tokens"]:
            raise OtherTokens(family, decode["tokens"], expected[model]["tokens"])

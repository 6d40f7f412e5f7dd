"""A second start of stock vLLM finds what the first compiled, and on CPUs cannot load it.

Ranks compile by the same code, so that each start of a rank compiles anew as well.
"""

from pathlib import Path

import pytest

from tests.e2e.conftest import Checkpoints
from tests.e2e.matrix import run_cases
from tests.tables.said import Said

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.feature(
    "torch.compile: a second start takes what the first one compiled",
    stock_fails="reason: 'function' object has no attribute 'finalize_loading'",
)
def test_a_second_start_compiles_again(
    checkpoints: Checkpoints, tmp_path: Path, said: Said
) -> None:
    model = checkpoints("qwen3_moe", 8, num_hidden_layers=1)
    tokens, logs = [], []
    for name in ("first", "second"):
        case = {"name": name, "model": model, "engine_args": {"enforce_eager": False}}
        environment = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
        (result,) = run_cases(tmp_path, name, [case], environment)[name]
        tokens.append(result["tokens"])
        logs.append((tmp_path / f"{name}-0.log").read_text())
        assert "saved AOT compiled function" in logs[-1], "nothing was compiled"
    assert "due to a load failure" not in logs[0]
    said(logs[1])
    assert tokens[0] == tokens[1]

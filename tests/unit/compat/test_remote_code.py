"""Which processes copy code of checkpoints under the lock; the lock itself: `multiprocess`."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.compat.front_ends import configure
from vllm_dwdp.executor import executor

pytestmark = pytest.mark.usefixtures("nothing_stays_wrapped")


@pytest.fixture(autouse=True)
def transformers_copies() -> Iterator[Any]:
    """Whether this process does so under the lock; it is made stock again."""
    from transformers import dynamic_module_utils as stock

    before = stock.get_cached_module_file
    yield lambda: hasattr(stock.get_cached_module_file, "dwdp_stock")
    stock.get_cached_module_file = before


def test_a_front_end_that_trusts_remote_code(
    model: str,
    tmp_path: Path,
    transformers_copies: Any,
) -> None:
    ranks = {"data_parallel_size": 2, "data_parallel_rank": 0}
    configure(model, tmp_path, **ranks)
    configure(model, None, trust_remote_code=True)
    assert not transformers_copies(), "nobody trusted, or it is stock vLLM"
    configure(model, tmp_path, **ranks, trust_remote_code=True)
    assert transformers_copies()


@pytest.mark.parametrize("trusts", [True, False])
def test_an_engine_that_trusts_remote_code(
    trusts: bool, transformers_copies: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads a tokenizer, beside the API servers, once its executor has started."""
    monkeypatch.setattr(executor.independent, "restore_model_config", lambda config: None)
    monkeypatch.setattr(executor.independent, "match_front_end_cache", lambda config: None)
    monkeypatch.setattr(executor, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    rank = executor.RankExecutor.__new__(executor.RankExecutor)
    rank.vllm_config = SimpleNamespace(model_config=SimpleNamespace(trust_remote_code=trusts))
    with rank.starting():
        assert transformers_copies() == trusts

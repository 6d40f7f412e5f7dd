"""DeepSeek-V4: what its layers keep, compressed, and what its weights take.

`tests/compat/test_kv_cache.py` asks vLLM's own layers for the same sizes.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.planner.models import DEEPSEEK_V4_FLASH, run_plan
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.model_shape import ModelShape, shape_of

FLASH = shape_of(DEEPSEEK_V4_FLASH)
PACKED, PLAIN = 448 + 2 * 64 + 8, 2 * 512
"""Bytes of an entry, in 8 bits with scales and in 16 bits."""
INDEX_KEY = 128 + 4


def params(shape: ModelShape, experts_of_a_layer: int) -> float:
    """Return the weights of a model of which each layer has so many routed experts."""
    a_layer = experts_of_a_layer * shape.expert_params + shape.shared_params
    return shape.num_layers * (a_layer + shape.attention_params)


def test_the_published_numbers_of_parameters() -> None:
    """DeepSeek says 284 billion, and 13 billion for a token."""
    ends = FLASH.embedding_params
    assert round((params(FLASH, FLASH.num_experts) + ends) / 1e9) == 284
    assert round((params(FLASH, FLASH.experts_per_token) + ends / 2) / 1e9) == 13


@pytest.mark.parametrize(("kv_dtype", "entry"), [(None, PACKED), ("fp8", PACKED), ("bf16", PLAIN)])
def test_what_its_layers_keep(kv_dtype: str | None, entry: int) -> None:
    cache = shape_of(DEEPSEEK_V4_FLASH, kv_dtype=kv_dtype).kv_cache
    assert cache.token_bytes == 21 * (entry + INDEX_KEY) / 4 + 20 * entry / 128
    chosen, whole = 8 * 2 * 2 * (512 + 128) * 4, 128 * 2 * 512 * 4
    assert cache.window_bytes == 43 * 128 * entry + 21 * chosen + 20 * whole
    assert (cache.num_full, cache.window_tokens, cache.state_bytes) == (41, 128, 0)


def test_what_a_query_sees_and_reads() -> None:
    cache, tokens = FLASH.kv_cache, 1 << 20
    seen = 43 * 128 + 21 * 512 + 20 * tokens / 128
    assert cache.keys_seen(tokens) == seen / 43, (
        "of the entries for 4 tokens, those that are chosen"
    )
    waiting = cache.window_bytes - 43 * 128 * PACKED
    assert cache.read_bytes(tokens) == (seen * PACKED + waiting) / 43
    entries = 21 * tokens / 4
    assert cache.scoring(tokens) == {8: (entries * 2 * 64 * 128 / 43, entries * INDEX_KEY / 43)}
    short = 43 * 64 + 21 * 64 / 4 + 20 * 64 / 128
    assert cache.keys_seen(64) == short / 43, "all that there are"


def test_gpus_of_a_rank_keep_all_of_it_each() -> None:
    found = shape_of(DEEPSEEK_V4_FLASH, tensor_parallel_size=4).kv_cache
    assert found.token_bytes == 4 * FLASH.kv_cache.token_bytes
    assert found.window_bytes == 4 * FLASH.kv_cache.window_bytes


BLOCK_SCALE = 32 / 128**2


@pytest.mark.parametrize(
    ("changes", "experts", "attention"),
    [
        ({}, 4.25, 8 + BLOCK_SCALE),
        ({"expert_dtype": None}, 4.25, 8 + BLOCK_SCALE),
        ({"expert_dtype": "fp8"}, 8 + BLOCK_SCALE, 8 + BLOCK_SCALE),
        ({"quantization_config": {"quant_method": "fp8", "moe_quant_algo": "NVFP4"}}, 4.5, 8),
        ({"quantization_config": None}, 16, 16),
    ],
)
def test_experts_have_a_format_of_their_own(
    changes: dict[str, Any], experts: float, attention: float
) -> None:
    found = shape_of(DEEPSEEK_V4_FLASH | changes)
    assert (found.expert_bits, found.attention_bits) == (experts, attention)


@pytest.mark.parametrize(
    "changes",
    [
        {"compress_ratios": [2] * 43},
        {"compress_ratios": []},
        {"model_type": "deepseek_v41"},
    ],
)
def test_other_compression_is_unknown(changes: dict[str, Any]) -> None:
    with pytest.raises(
        DwdpConfigError, match="is known here for deepseek_v4 with entries of 4 and"
    ):
        shape_of(DEEPSEEK_V4_FLASH | changes)


def test_a_plan(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V4_FLASH))
    ended = run_plan("--model", str(tmp_path), "--gpu", "h200")
    assert ended.returncode == 0, ended.stderr
    assert "KV cache per token, 41 of 43 layers" in ended.stdout and " 3.85 " in ended.stdout
    assert "windows of 128 tokens, at most" in ended.stdout and " 15.42 " in ended.stdout

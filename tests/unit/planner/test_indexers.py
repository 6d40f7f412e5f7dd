"""Sparse attention: what indexers keep, choose and cost."""

from typing import Any

import pytest

from tests.unit.planner.models import QWEN3_30B
from vllm_dwdp.paper import DEEPSEEK_R1
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.hardware import PEAK, load_hardware
from vllm_dwdp.planner.kv_cache import KvCache
from vllm_dwdp.planner.model_shape import shape_of
from vllm_dwdp.planner.step import Step

INDEXED = {"index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
"""DeepSeek-V3.2's."""
BLOCKS = {
    "sparse_attention_freq": [0] * 12 + [1] * 36,
    "sparse_index_dim": 128,
    "sparse_num_index_heads": 4,
    "sparse_topk_blocks": 16,
    "sparse_block_size": 128,
}
"""MiniMax-M3's, of 36 layers out of 48."""
KEY = 128 + 4


def cache(config: dict[str, Any], **changes: Any) -> KvCache:
    return shape_of(config | changes).kv_cache


def test_an_indexer_keeps_a_key_of_its_own_type() -> None:
    """In FP8 with a scale for 128 elements, also where keys and values have another type.

    A latent in FP8 is packed then: its rotary part in 16 bits, and four scales.
    """
    latent = cache(DEEPSEEK_R1)
    for dtype, packed in ((None, 0), ("fp8", 64 + 4 * 4)):
        base = shape_of(DEEPSEEK_R1, kv_dtype=dtype).kv_cache
        found = shape_of(DEEPSEEK_R1 | INDEXED, kv_dtype=dtype).kv_cache
        assert found.token_bytes - base.token_bytes == 61 * (132 + packed)
    types = ["full"] + ["shared"] * 60
    shared = cache(DEEPSEEK_R1 | INDEXED, indexer_types=types)
    assert shared.token_bytes - latent.token_bytes == 132, "layers that share an indexer"


def test_an_indexer_of_pools_keeps_a_key_for_each_and_the_tokens_of_the_open_one() -> None:
    """GLM-5.3-Flash's."""
    plain, found = cache(DEEPSEEK_R1), cache(DEEPSEEK_R1, **INDEXED, index_kpool=16)
    assert found.token_bytes == plain.token_bytes + 61 * (128 + 4) / 16
    assert (found.window_tokens, found.window_bytes) == (16, 61 * 16 * 2 * 128 * 2)
    every_fourth = (["full"] + ["shared"] * 3) * 15 + ["full"]
    shared = cache(DEEPSEEK_R1, **INDEXED, index_kpool=16, indexer_types=every_fourth)
    assert shared.window_bytes == 16 * 16 * 2 * 128 * 2


def test_a_query_sees_the_tokens_that_are_chosen_and_an_indexer_scores_all() -> None:
    found = cache(DEEPSEEK_R1 | INDEXED)
    assert (found.keys_seen(10_000), found.keys_seen(1000)) == (2048, 1000)
    assert found.read_bytes(10_000) == 2048 * 576 * 2
    assert found.scoring(10_000) == {8: (2 * 10_000 * 64 * 128, 10_000 * KEY)}
    assert cache(DEEPSEEK_R1).scoring(10_000) == {}


def test_layers_that_take_what_another_chose_score_nothing() -> None:
    types = ["full"] + ["shared"] * 60
    found = cache(DEEPSEEK_R1 | INDEXED, indexer_types=types)
    assert found.keys_seen(10_000) == 2048
    assert found.scoring(10_000) == {8: (2 * 10_000 * 64 * 128 / 61, 10_000 * KEY / 61)}


def test_of_pools_a_key_of_each_is_scored() -> None:
    found = cache(DEEPSEEK_R1 | INDEXED, index_kpool=16)
    assert found.scoring(16_000) == {8: (2 * 1000 * 64 * 128, 1000 * KEY)}


def test_an_indexer_of_blocks_chooses_in_the_layers_that_have_it() -> None:
    plain, found = cache(QWEN3_30B), cache(QWEN3_30B, sparse_attention_config=BLOCKS)
    assert found.token_bytes == plain.token_bytes + 36 * 128 * 2, "keys in bf16"
    assert found.keys_seen(10_000) == (12 * 10_000 + 36 * 16 * 128) / 48
    assert found.scoring(10_000) == {
        16: (36 * 2 * 10_000 * 4 * 128 / 48, 36 * 10_000 * 128 * 2 / 48)
    }


def test_each_gpu_of_a_rank_scores_for_itself() -> None:
    one = cache(DEEPSEEK_R1 | INDEXED).scoring(1000)[8]
    four = shape_of(DEEPSEEK_R1 | INDEXED, tensor_parallel_size=4).kv_cache.scoring(1000)[8]
    assert four == (4 * one.operations, 4 * one.num_bytes)


def test_the_weights_of_an_indexer_are_those_of_attention() -> None:
    queries, key, head_weights = 1536 * 64 * 128, 7168 * 128, 7168 * 64
    plain, found = shape_of(DEEPSEEK_R1), shape_of(DEEPSEEK_R1 | INDEXED)
    more = found.attention_params - plain.attention_params
    assert more == queries + key + head_weights
    blocks = shape_of(QWEN3_30B | {"sparse_attention_config": BLOCKS})
    more = blocks.attention_params - shape_of(QWEN3_30B).attention_params
    assert more == 36 / 48 * 2048 * (4 + 1) * 128


@pytest.mark.parametrize("tokens_per_reading", [1.0, 128.0])
def test_the_time_of_scoring_grows_with_all_keys(tokens_per_reading: float) -> None:
    """A decoded token reads every key; those of a prompt compute longer than they read."""
    hardware = load_hardware()["h200"]

    def attention(config: dict[str, Any], mean_keys: float) -> float:
        model = CostModel(shape=shape_of(config), hardware=hardware, efficiency=PEAK, group_size=4)
        step = Step(num_tokens=128, mean_keys=mean_keys, tokens_per_reading=tokens_per_reading)
        return model.dense_layer(step).attention

    near, far = (attention(DEEPSEEK_R1 | INDEXED, keys) for keys in (10_000, 110_000))
    read = 128 / tokens_per_reading * 100_000 * KEY / (hardware.memory_gbps * 1e9)
    compute = 128 * 2 * 100_000 * 64 * 128 / (hardware.fp8_tflops * 1e12)
    assert far - near == pytest.approx(max(read, compute))
    latent = 128 * 2 * 2048 * 128 * (512 + 64 + 512) / (hardware.bf16_tflops * 1e12)
    chosen = near - max(read, compute) / 10
    assert chosen == pytest.approx(latent), "the chosen ones are attended to as latents"

"""What the planner says that layers of DeepSeek-V4 keep, against the sizes of vLLM's own caches.

They are asked without the model, which stock vLLM does not run on CPUs: as on a GPU, packed in 8 bits.
"""

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.planner.models import DEEPSEEK_V4_FLASH
from vllm_dwdp.planner import compressed
from vllm_dwdp.planner.checkpoint import ConfigFields

pytestmark = pytest.mark.compat

LAYOUT = "fp8_ds_mla"
FIELDS = SimpleNamespace(**DEEPSEEK_V4_FLASH)


@pytest.mark.parametrize("ratio", [1, 4, 128])
def test_what_a_layer_keeps(ratio: int) -> None:
    fields = ConfigFields(DEEPSEEK_V4_FLASH | {"compress_ratios": [ratio]})
    parts = compressed.cache_parts(fields, 1, compressed.KV_BITS, 1)
    found = sorted((part.window, part.token_bytes(compressed.KV_BITS)) for part in parts)
    assert found == sorted((*window(), *entries(ratio), *waiting(ratio)))


def layer(ratio: int, size: int) -> Any:
    """Return what vLLM's layers read of themselves when they are asked what they keep."""
    from vllm.v1.attention.backends.mla.sparse_swa import DeepseekV4SWACache

    given = inspect.signature(DeepseekV4SWACache.__init__).parameters
    return SimpleNamespace(
        **{name: each.default for name, each in given.items() if each.default is not each.empty},
        cache_config=asked().cache_config,
        compress_ratio=ratio,
        dtype=torch.uint8,
        head_dim=size,
        kv_cache_dtype=LAYOUT,
        window_size=FIELDS.sliding_window,
    )


def asked() -> Any:
    return SimpleNamespace(cache_config=SimpleNamespace(block_size=256, cache_dtype=LAYOUT))


def per_token(spec: Any) -> float:
    return float(spec.real_page_size_bytes / spec.block_size)


def window() -> Iterator[tuple[int, float]]:
    from vllm.v1.attention.backends.mla.sparse_swa import DeepseekV4SWACache

    spec = DeepseekV4SWACache.get_kv_cache_spec(layer(1, FIELDS.head_dim), asked())
    yield spec.sliding_window, per_token(spec)


def entries(ratio: int) -> Iterator[tuple[int, float]]:
    """Ask for the compressed entries, and for the index of those that are chosen, as one."""
    from vllm.models.deepseek_v4.attention import DeepseekV4Attention, DeepseekV4IndexerCache

    spec = DeepseekV4Attention.get_kv_cache_spec(layer(ratio, FIELDS.head_dim), asked())
    if ratio == 1:
        assert spec is None
        return
    index_bytes = 0.0
    if ratio == 4:
        key = layer(ratio, FIELDS.index_head_dim + 4)
        index_bytes = per_token(DeepseekV4IndexerCache.get_kv_cache_spec(key, asked()))
    yield 0, per_token(spec) + index_bytes


def waiting(ratio: int) -> Iterator[tuple[int, float]]:
    """Ask for the states of compressors: of the entries, and of the index."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.models.deepseek_v4.compressor import CompressorStateCache

    sizes = {1: (), 4: (FIELDS.head_dim, FIELDS.index_head_dim), 128: (FIELDS.head_dim,)}[ratio]
    for size in sizes:
        width = 2 * (1 + (ratio == 4)) * size
        with set_current_vllm_config(VllmConfig()):
            state = CompressorStateCache(width, torch.float32, ratio, f"state of {size}")
        spec = state.get_kv_cache_spec(asked())
        yield spec.sliding_window, per_token(spec)

"""Sparse multi-head latent attention."""

from typing import Any

import torch

from tests.helpers.missing_kernels.chosen_tokens import best, packed, quantise, unpacked


def sparse_attention() -> None:
    """Attend to the latents whose indexed keys score best.

    The cache of an indexer has a token's key in FP8 with its scales, as many bytes as on GPUs.
    """
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers import sparse_attn_indexer
    from vllm.model_executor.layers.quantization.utils import fp8_utils
    from vllm.model_executor.models import deepseek_v2
    from vllm.platforms import cpu

    from tests.helpers.missing_kernels.sparse_backend import IndexedKeys, SparseLatents

    platform: Any = cpu.CpuPlatform
    stock = platform.get_attn_backend_cls.__func__

    def backend(cls: Any, selected: Any, attn_selector_config: Any, **others: Any) -> str:
        if attn_selector_config.use_sparse:
            return ".".join(SparseLatents.full_cls_name())
        found: str = stock(cls, selected, attn_selector_config, **others)
        return found

    def choose(
        self: Any,
        hidden_states: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        batches = get_forward_context().attn_metadata
        chosen: torch.Tensor = self.topk_indices_buffer
        if batches is None:  # a run to see how much memory is needed
            return chosen
        cache = self.k_cache.kv_cache
        for each in batches[self.k_cache.prefix].sequences:
            own = slice(each.start, each.stop)
            each.write(cache, each.first, packed(k[own]))
            keys = unpacked(each.rows(cache), self.head_dim)
            chosen[own] = best(q[own], weights[own], keys, each.num_seen, self.topk_tokens)
        return chosen

    platform.get_attn_backend_cls = classmethod(backend)
    indexer: Any = sparse_attn_indexer.SparseAttnIndexer
    indexer.forward_cpu = choose
    kept: Any = deepseek_v2.DeepseekV32IndexerCache
    kept.get_attn_backend = lambda self: IndexedKeys
    for module in (fp8_utils, deepseek_v2):  # others import it later
        users: Any = module
        users.per_token_group_quant_fp8 = quantise_groups


def quantise_groups(
    x: torch.Tensor, group_size: int, *, column_major_scales: bool, use_ue8m0: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[..., size]` in FP8 and its groups' scales, row by row."""
    assert not column_major_scales
    return quantise(x, group_size, use_ue8m0)

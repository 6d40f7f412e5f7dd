"""Indexers that keep a key for several tokens (GLM-5.3-Flash)."""

from typing import Any

import torch

from tests.helpers.missing_kernels.chosen_tokens import GROUP, best, packed, quantise, unpacked


def pools_of_keys() -> None:
    """Pool keys by the softmax of their gates, choose among pools, and see the open one's tokens too.

    The cache has a pool's key as `sparse_attention` has a token's; a ring keeps keys and gates of the
    last tokens of a sequence, by position.
    """
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers import mla
    from vllm.models.glm5next import sparse_indexer
    from vllm.models.glm5next.common import attention
    from vllm.v1.attention.backends.mla.indexer import KpoolTailBackend

    from tests.helpers.missing_kernels.sparse_backend import Batches, IndexedKeys, Sequence

    def choose(
        self: Any,
        hidden_states: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        weights: torch.Tensor,
        *,
        gate_score: torch.Tensor,
        compress_ape: torch.Tensor,
        index_kpool: int,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        batches = get_forward_context().attn_metadata
        chosen: torch.Tensor = self.topk_indices_buffer
        if batches is None:  # a run to see how much memory is needed
            return chosen
        cache, ring = self.k_cache.kv_cache, self.tail_cache.kv_cache
        tails = batches[self.tail_cache.prefix].sequences
        for each, tail in zip(batches[self.k_cache.prefix].sequences, tails, strict=True):
            own = slice(each.start, each.stop)
            rows = torch.stack((k[own], gate_score[own].to(k.dtype)))
            keep(each, rows, cache, ring[tail.blocks[0]], compress_ape)
            keys = unpacked(each.rows(cache, index_kpool), self.head_dim)
            pools = each.num_seen // index_kpool
            found = best(q[own], weights[own], keys, pools, self.topk_tokens // index_kpool)
            places = tokens_of(found, each.num_seen, index_kpool)
            chosen[own] = -1
            chosen[own, : places.shape[1]] = places
        return chosen

    def keep(
        each: Sequence,
        rows: torch.Tensor,
        cache: torch.Tensor,
        ring: torch.Tensor,
        bias: torch.Tensor,
    ) -> None:
        """Write a sequence's new keys and gates, `[2, tokens, size]`, to its ring and as pools."""
        size, first = bias.shape[0], each.first
        opened = first // size * size
        before = ring[:, torch.arange(opened, first) % ring.shape[1]]
        num_pools = each.length // size - opened // size
        whole = torch.cat((before, rows), 1)[:, : num_pools * size]
        keys, gates = whole.unflatten(1, (num_pools, size)).float()
        pooled = ((gates + bias).softmax(1) * keys).sum(1).to(rows.dtype)
        each.write(cache, opened // size, packed(rotated(pooled)))
        last = torch.arange(max(first, each.length - ring.shape[1]), each.length)
        ring[:, last % ring.shape[1]] = rows[:, last - first]

    layer: Any = sparse_indexer.SparseAttnIndexerKpool
    layer.forward_cpu = choose
    indexer: Any = attention
    stock = indexer.Indexer.__init__

    def init(self: Any, *given: Any, **named: Any) -> None:
        stock(self, *given, **named)
        self.wk_weights_proj._cpu_skip_gemm_dispatch = True  # its weight is read, so it must stay

    indexer.Indexer.__init__ = init
    indexer.Glm5NextIndexerCache.get_attn_backend = lambda self: IndexedKeys
    rings: Any = KpoolTailBackend
    rings.get_builder_cls = staticmethod(lambda: Batches)
    indexer.fwht128_quant_fp8 = lambda q: quantise(rotated(q), GROUP, powers=True)
    latents: Any = mla
    latents.fused_q_kv_rmsnorm = normalised


def tokens_of(pools: torch.Tensor, num_seen: torch.Tensor, size: int) -> torch.Tensor:
    """Return the places of pools' tokens `[T, count * size]`, and of those in none yet; -1 for none."""
    offsets = torch.arange(size, dtype=torch.int32)
    in_pools = (pools[..., None] * size + offsets).masked_fill(pools[..., None] < 0, -1)
    others = num_seen[:, None] // size * size + offsets[:-1]
    return torch.cat((in_pools.flatten(1), others.masked_fill(others >= num_seen[:, None], -1)), 1)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Return rows times the orthogonal Hadamard matrix of their size, a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < x.shape[-1]:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return (x.float() @ matrix * len(matrix) ** -0.5).to(x.dtype)


def normalised(
    q: torch.Tensor, kv: torch.Tensor, q_weight: torch.Tensor, kv_weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two latents, each divided by the root mean square of its row."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        found = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
        return found.to(x.dtype)

    return norm(q, q_weight), norm(kv, kv_weight)

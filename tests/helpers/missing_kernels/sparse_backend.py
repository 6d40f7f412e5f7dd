"""A backend of vLLM for sparse latent attention, and one for its indexers, on CPUs.

Imported where vLLM is; the cache's layout is `[num_blocks, block_size, bytes or elements of a token]`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention.sparse_mla_attention import SharedTopkIndicesBuffer
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MLAAttentionImpl,
    MultipleOf,
)

from tests.helpers.missing_kernels.chosen_tokens import attend


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One request's part of a batch: its tokens `start` to `stop`, and its blocks up to `length`."""

    start: int
    stop: int
    length: int
    blocks: torch.Tensor

    @property
    def first(self) -> int:
        """The position of its first token in the batch."""
        return self.length - (self.stop - self.start)

    @property
    def num_seen(self) -> torch.Tensor:
        """The tokens that each query sees, itself included."""
        return torch.arange(self.first, self.length) + 1

    def rows(self, cache: torch.Tensor, pool: int = 1) -> torch.Tensor:
        """Return what a cache keeps of the sequence: a row for each `pool` tokens."""
        count = self.length // pool
        used = self.blocks[: -(-count // cache.shape[1])]
        return cache[used].flatten(0, 1)[:count]

    def write(self, cache: torch.Tensor, first: int, rows: torch.Tensor) -> None:
        """Write rows to a cache, from the sequence's row `first` on."""
        places = torch.arange(first, first + len(rows))
        cache[self.blocks[places // cache.shape[1]], places % cache.shape[1]] = rows


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What backends are told of a step; vLLM's layers read the counts.

    All queries, those of prompts too, go the way that vLLM calls decoding.
    """

    sequences: tuple[Sequence, ...]
    num_actual_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int = 0


class Batches(AttentionMetadataBuilder):
    """Describes a step as a `Batch`."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *others: Any
    ) -> Batch:
        common = common_attn_metadata
        return Batch(
            sequences=tuple(sequences(common)),
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=common.num_reqs,
            num_decode_tokens=common.num_actual_tokens,
        )


def sequences(common: CommonAttentionMetadata) -> Iterator[Sequence]:
    """List the requests of a step."""
    bounds = itertools.pairwise(common.query_start_loc_cpu.tolist())
    lengths = common.seq_lens.tolist()
    for number, (start, stop) in enumerate(bounds):
        blocks = common.block_table_tensor[number].long()
        yield Sequence(start=start, stop=stop, length=lengths[number], blocks=blocks)


class SparseLatents(AttentionBackend):
    """Attention to the latents that an indexer chose."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "SPARSE_LATENTS_IN_TORCH"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @staticmethod
    def get_builder_cls() -> type:
        return Batches

    @staticmethod
    def get_impl_cls() -> type:
        return SparseAttention

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def is_sparse(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True


class IndexedKeys(SparseLatents):
    """The keys of indexers, which have no attention of their own."""

    @staticmethod
    def get_name() -> str:
        return "INDEXED_KEYS_IN_TORCH"


class SparseAttention(MLAAttentionImpl, SharedTopkIndicesBuffer):
    """What `SparseLatents` computes."""

    is_sparse = True
    supports_dense_mha_prefill = False

    def __init__(
        self,
        *,
        num_heads: int,
        head_size: int,
        scale: float,
        kv_lora_rank: int,
        kv_cache_dtype: str,
        indexer: Any = None,
        topk_indices_buffer: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.kv_lora_rank, self.kv_cache_dtype = kv_lora_rank, kv_cache_dtype
        self.sinks = sinks
        self.init_topk_indices_buffer(indexer, topk_indices_buffer)

    def record_logical_topk_ready(self) -> None:
        """Do nothing: no other thread waits for the choice."""

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        *others: Any,
    ) -> None:
        if kv_cache.numel():
            count = slot_mapping.numel()
            rows = torch.cat((kv_c_normed[:count], k_pe[:count].flatten(1)), -1)
            slots = slot_mapping.flatten().long()
            kept = slots >= 0  # a slot below zero is none
            places = slots[kept] // kv_cache.shape[1], slots[kept] % kv_cache.shape[1]
            kv_cache[places] = rows[kept]

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: Batch,
        layer: Any,
    ) -> tuple[torch.Tensor, None]:
        queries = torch.cat(q, -1) if isinstance(q, tuple) else q
        seen = queries.new_empty(*queries.shape[:2], self.kv_lora_rank)
        for each in attn_metadata.sequences:
            own = slice(each.start, each.stop)
            seen[own] = attend(
                queries[own],
                each.rows(kv_c_and_k_pe_cache),
                self.topk_indices_buffer[own],
                self.kv_lora_rank,
                self.scale,
                self.sinks,
            )
        return seen, None

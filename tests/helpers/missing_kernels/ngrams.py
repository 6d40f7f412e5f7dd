"""Embeddings of the last tokens together (LongCat-Flash-Lite)."""

from typing import Any

import torch


def ids_of_ngrams() -> None:
    """Find the rows of a token and those before it, in every table; a negative one ends what is seen."""
    from vllm import _custom_ops

    def compute(
        longest: int,
        num_tables: int,
        powers: torch.Tensor,
        sizes: torch.Tensor,
        first_rows: torch.Tensor,
        first_tokens: torch.Tensor,
        tokens: torch.Tensor,
        rows: torch.Tensor,
        first_columns: torch.Tensor,
        ids: torch.Tensor,
    ) -> None:
        lengths = first_tokens.diff().long()
        requests = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        own = torch.arange(len(ids)) - first_tokens[:-1].long()[requests]
        last = first_columns.long()[requests] + own
        back = last[:, None] - torch.arange(longest)
        seen = tokens[rows[requests][:, None], back.clamp(min=0)].long()
        is_seen = ((seen >= 0) & (back >= 0)).cumprod(1)
        # [tokens, lengths, tables, tokens back]; a length of n looks n - 1 tokens back.
        terms = (seen * is_seen)[:, None, None, :] * powers.long() % sizes.long()[..., None]
        reaches = torch.arange(longest) <= torch.arange(1, longest)[:, None]
        found = (terms * reaches[:, None, :]).sum(-1) % sizes.long()
        ids.copy_(found.reshape(len(ids), -1) + first_rows[: (longest - 1) * num_tables])

    custom_ops: Any = _custom_ops
    custom_ops.ngram_compute_n_gram_ids = compute

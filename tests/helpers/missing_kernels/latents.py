"""Multi-head latent attention."""

from typing import Any

import torch


def blocks_of_latents() -> None:
    """Let latent attention on CPUs take large blocks of the KV cache, as blocks of 16 tokens."""
    from vllm.v1.attention.backends.mla import cpu_mla

    backend: Any = cpu_mla.CPUMLABackend
    backend.supports_block_size = classmethod(lambda cls, size: size is None or size % 16 == 0)


def caches_of_latents() -> None:
    """Write Kimi's latents into the KV cache, and put queries and keys together, in two steps."""
    from vllm.models.kimi_k3.nvidia import mla

    def write(cache: torch.Tensor, slots: torch.Tensor, *parts: torch.Tensor) -> None:
        cache[slots // cache.shape[1], slots % cache.shape[1]] = torch.cat(parts, -1)

    def keys_of_prompts(
        q: torch.Tensor,
        k_nope: torch.Tensor,
        k_pe: torch.Tensor,
        latents: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
        *no_rotation: None,
    ) -> torch.Tensor:
        write(cache, slots, latents, k_pe.flatten(1))
        return torch.cat((k_nope, k_pe.expand(-1, k_nope.shape[1], -1)), -1)

    def queries_of_tokens(
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        latents: torch.Tensor,
        k_pe: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
        **no_rotation: None,
    ) -> torch.Tensor:
        write(cache, slots, latents, k_pe.flatten(1))
        return torch.cat((q_nope, q_pe), -1)

    attention: Any = mla.MultiHeadLatentAttention
    stock = attention.__init__

    def init(self: Any, *given: Any, **named: Any) -> None:
        stock(self, *given, **named)
        self.kv_b_proj._cpu_skip_gemm_dispatch = True  # its weight is read, so it must stay

    attention.__init__ = init
    latent: Any = mla
    latent.fused_mla_key_concat_kv_cache_insert = keys_of_prompts
    latent.fused_mla_decode_q_concat_kv_cache_insert = queries_of_tokens

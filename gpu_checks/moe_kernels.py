"""Fused-MoE layers for tests and benchmarks: vLLM's Triton kernel, or torch's grouped matmul.

Both read `w13` `[num_experts, 2 * intermediate_size, hidden_size]` and `w2` `[num_experts,
hidden_size, intermediate_size]` where they are, allocate nothing on the host's clock and can be
captured. The weights' float8 scales are 1: what the products are worth is not the question here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

MoeKernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]
"""(hidden_states, w13, w2, topk_weights, topk_ids) -> output, `[num_tokens, hidden_size]`."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which experts a batch goes to, as a router would say it: `[num_tokens, top_k]`."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor

    @classmethod
    def random(
        cls, num_tokens: int, num_experts: int, top_k: int, device: torch.device, seed: int = 0
    ) -> "Routing":
        """Route every token independently and uniformly."""
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(num_tokens, num_experts, generator=generator, device=device)
        weights, ids = logits.softmax(dim=-1).topk(top_k)
        return cls(topk_weights=weights, topk_ids=ids.to(torch.int32))


def grouped_moe(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """Sort tokens by expert, take two grouped products and sum in a fixed order."""
    num_tokens, top_k = topk_ids.shape
    flat = topk_ids.flatten().long()
    order = flat.argsort(stable=True)
    ones = torch.ones_like(flat, dtype=torch.int32)
    counts = torch.zeros(w13.shape[0], dtype=torch.int32, device=flat.device)
    offsets = counts.scatter_add_(0, flat, ones).cumsum(0).to(torch.int32)
    product = _grouped_product if w13.dtype == torch.bfloat16 else _grouped_float8_product
    gate, up = product(hidden_states[order // top_k], w13, offsets).chunk(2, dim=-1)
    sorted_output = product(F.silu(gate) * up, w2, offsets)
    output = torch.empty_like(sorted_output)
    output[order] = sorted_output
    weighted = output.view(num_tokens, top_k, -1) * topk_weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden_states.dtype)


def _grouped_product(
    rows: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Multiply in bf16 by torch.nn.functional.grouped_mm, in torch since 2.10."""
    return F.grouped_mm(rows, weights.transpose(-2, -1), offs=offsets)


def _grouped_float8_product(
    rows: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Multiply in float8 with one scale per row, on Hopper only."""
    ones = torch.ones(1, dtype=torch.float32, device=rows.device)
    result: torch.Tensor = torch._scaled_grouped_mm(
        rows.to(weights.dtype),
        weights.transpose(-2, -1),
        ones.expand(rows.shape[0]).contiguous(),
        ones.expand(weights.shape[:2]).contiguous(),
        offs=offsets,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return result


def reference_moe(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """Compute the layer expert by expert in float32; waits for the device."""
    output = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for expert in range(w13.shape[0]):
        tokens, place = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden_states[tokens].float() @ w13[expert].float().T).chunk(2, dim=-1)
        product = (F.silu(gate) * up) @ w2[expert].float().T
        output.index_add_(0, tokens, product * topk_weights[tokens, place].unsqueeze(-1))
    return output.to(hidden_states.dtype)


def vllm_moe(num_experts: int, dtype: torch.dtype, device: torch.device) -> MoeKernel:
    """Return vLLM's Triton kernel, which quantises the input per tensor for float8 weights.

    Raises:
        ImportError: vLLM is not importable here.
    """
    from vllm.model_executor.layers.fused_moe.config import (
        FUSED_MOE_UNQUANTIZED_CONFIG,
        fp8_w8a8_moe_quant_config,
    )
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    config = FUSED_MOE_UNQUANTIZED_CONFIG
    if dtype != torch.bfloat16:
        scale = torch.ones(num_experts, dtype=torch.float32, device=device)
        config = fp8_w8a8_moe_quant_config(w1_scale=scale, w2_scale=scale)

    def kernel(
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        output: torch.Tensor = fused_experts(
            hidden_states, w13, w2, topk_weights, topk_ids, quant_config=config
        )
        return output

    return kernel


def choose_kernel(
    num_experts: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, MoeKernel]:
    """Return vLLM's kernel if it works here, else torch's; and which it is, and why."""
    reason = "NOT A GPU"
    if device.type == "cuda":
        try:
            kernel = vllm_moe(num_experts, dtype, device)
            _try(kernel, num_experts, dtype, device)
            return "vLLM fused_experts (Triton)", kernel
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
    elif dtype != torch.bfloat16:
        return f"reference, expert by expert ({reason})", reference_moe
    return f"torch grouped_mm (vLLM's kernel was not used: {reason})", grouped_moe


def _try(kernel: MoeKernel, num_experts: int, dtype: torch.dtype, device: torch.device) -> None:
    """Run a small layer once: kernels of another architecture fail only when they are launched."""
    hidden, intermediate = 256, 128
    w13 = torch.zeros(num_experts, 2 * intermediate, hidden, device=device).to(dtype)
    w2 = torch.zeros(num_experts, hidden, intermediate, device=device).to(dtype)
    routing = Routing.random(16, num_experts, 2, device)
    hidden_states = torch.zeros(16, hidden, dtype=torch.bfloat16, device=device)
    kernel(hidden_states, w13, w2, routing.topk_weights, routing.topk_ids)
    torch.accelerator.synchronize()

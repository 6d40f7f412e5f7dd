"""The Triton kernels of a fused-MoE layer with LoRA, in torch, so that vLLM's own layers run on a CPU.

With LoRA vLLM takes its Triton experts on every device, and on a CPU there is no Triton. `install`
puts plain sums in the place of the kernels that `TritonExperts.apply` and the CPU's Punica wrapper
call; layers, contexts, adapters and their slots stay vLLM's. Stock engines and ours are run with it
alike.
"""

import functools
import os
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PLUGINS = Path(__file__).with_name("torch_plugins")


def environment() -> dict[str, str]:
    """Return what makes a started program and all its engines' processes `install` too, as a plugin."""
    places = [str(ROOT), str(PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(places)}


@functools.cache
def install() -> None:
    """From now on, Triton experts of this process compute in torch."""
    from types import SimpleNamespace

    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    module: Any = triton_moe
    module.tl = SimpleNamespace(bfloat16=None, float16=None, float32=None)
    module.try_get_optimal_moe_config = lambda *args, **kwargs: {}
    module._prepare_expert_assignment = assign
    module.invoke_fused_moe_triton_kernel = multiply_by_experts
    module.TritonExperts.moe_sum = sum_over_experts
    wrapper: Any = PunicaWrapperCPU
    wrapper.add_lora_w13 = add_lora_w13
    wrapper.add_lora_w2 = add_lora_w2


def assign(topk_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None, None]:
    """Return what `multiply_by_experts` gets in place of sorted tokens: each token's experts."""
    return topk_ids, None, None


def multiply_by_experts(
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    A_scale: None,
    B_scale: None,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    expert_ids: None,
    num_tokens_post_padded: None,
    mul_routed_weight: bool,
    top_k: int,
    config: dict[str, Any],
    B_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> None:
    """Write each routed row's product with its expert into `C` `[num_tokens, top_k, N]`.

    Args:
        A: `[num_tokens, K]` if `top_k` rows share one, else `[num_tokens * top_k, K]`.
        B: `[num_experts, N, K]`; only routed experts are read.
    """
    assert A_scale is None and B_scale is None, "this is a reference for unquantised experts"
    rows = A.repeat_interleave(top_k, 0).float()
    out = torch.empty(rows.shape[0], B.shape[1])
    experts = topk_ids.reshape(-1)
    for expert in experts.unique().tolist():
        chosen = experts == expert
        out[chosen] = rows[chosen] @ B[expert].float().T
        if B_bias is not None:
            out[chosen] += B_bias[expert].float()
    if mul_routed_weight:
        assert topk_weights is not None
        out *= topk_weights.reshape(-1, 1).float()
    C.copy_(out.view(C.shape))


def sum_over_experts(
    self: Any,
    input: torch.Tensor,
    output: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """Sum `[num_tokens, top_k, K]` over the experts of each token."""
    assert expert_map is None
    output.copy_(input.float().sum(1))


def add_lora_w13(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    expert_map: torch.Tensor | None,
    w1: torch.Tensor,
    w2: torch.Tensor,
    num_tokens: int,
    top_k_num: int,
    max_loras: int,
    adapter_enabled: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None, None, torch.Tensor]:
    """Add the adapters' part to the first product, slice by slice; w2 gets the routing back."""
    assert expert_map is None
    slots = self.token_lora_indices[:num_tokens]
    rows = x.repeat_interleave(top_k_num, 0)
    experts = topk_ids.reshape(-1)
    add_adapters(
        y, rows, lora_a_stacked, lora_b_stacked, experts, slots.repeat_interleave(top_k_num)
    )
    return experts, None, None, slots


def add_lora_w2(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    topk_weights: torch.Tensor,
    experts: torch.Tensor,
    expert_ids: None,
    num_tokens_post_padded: None,
    slots: torch.Tensor,
    num_tokens: int,
    w1: torch.Tensor,
    w2: torch.Tensor,
    top_k_num: int,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Add the adapters' part, times the routing weights, to the second product."""
    add_adapters(
        y,
        x,
        lora_a_stacked,
        lora_b_stacked,
        experts,
        slots.repeat_interleave(top_k_num),
        topk_weights.reshape(-1, 1).float(),
    )


def add_adapters(
    y: torch.Tensor,
    rows: torch.Tensor,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    experts: torch.Tensor,
    slots: torch.Tensor,
    factors: torch.Tensor | float = 1.0,
) -> None:
    """Add `rows @ A.T @ B.T` of each row's expert and adapter slot to `y`, slice beside slice.

    Args:
        y: `[..., N]`, a row for each of `rows`.
        lora_a_stacked: of each slice, `[max_loras, num_experts, rank, K]`.
        lora_b_stacked: of each slice, `[max_loras, num_experts, N / slices, rank]`.
        experts: of each row.
        slots: of each row; -1 for none.
        factors: of each row.
    """
    delta = torch.zeros(rows.shape[0], y.shape[-1])
    for slot, expert in {*zip(slots.tolist(), experts.tolist(), strict=True)}:
        if slot < 0:
            continue
        chosen = (slots == slot) & (experts == expert)
        parts = [
            rows[chosen].float() @ a[slot, expert].float().T @ b[slot, expert].float().T
            for a, b in zip(lora_a_stacked, lora_b_stacked, strict=True)
        ]
        delta[chosen] = torch.cat(parts, -1)
    y.copy_(y.float() + (delta * factors).view(y.shape))

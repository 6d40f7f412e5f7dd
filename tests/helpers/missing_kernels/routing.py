"""The choice of experts."""

from typing import Any

import torch


def routing_by_sigmoid() -> None:
    """Route by vLLM's grouped top-k on CPUs, with one group, where its plain one knows softmax only."""
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    router: Any = cpu_router.CPURouter
    stock = router._compute_routing

    def compute_routing(
        self: Any,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        *args: Any,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if (
            self.scoring_func != "sigmoid"
            or self.use_grouped_topk
            or self.custom_routing_function is not None
        ):
            return stock(self, hidden_states, router_logits, *args, **named)
        weights, experts = cpu_router._grouped_topk(
            gating_output=router_logits,
            topk=self.top_k,
            renormalize=self.renormalize,
            num_expert_group=1,
            topk_group=1,
            scoring_func="sigmoid",
            routed_scaling_factor=self.routed_scaling_factor,
            e_score_correction_bias=self.e_score_correction_bias,
        )
        return weights, experts

    router._compute_routing = compute_routing


def zero_experts() -> None:
    """Choose among all experts by a biased softmax; a zero expert returns its token as it came."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.fused_moe.router import zero_expert_router

    def topk_softmax(
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        token_expert_indices: torch.Tensor,
        gating_output: torch.Tensor,
        renormalize: bool = False,
        e_score_correction_bias: torch.Tensor | None = None,
        is_padding: torch.Tensor | None = None,
    ) -> None:
        assert is_padding is None or not is_padding.any()
        scores = gating_output.float().softmax(-1)
        biased = scores if e_score_correction_bias is None else scores + e_score_correction_bias
        chosen = biased.topk(topk_ids.shape[-1]).indices
        weights = scores.gather(-1, chosen)
        topk_ids.copy_(chosen)
        topk_weights.copy_(weights / weights.sum(-1, keepdim=True) if renormalize else weights)

    def return_tokens(
        expert_indices: torch.Tensor,
        expert_scales: torch.Tensor,
        num_experts: int,
        zero_expert_type: str,
        hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        assert zero_expert_type == "identity"
        share = (expert_scales * (expert_indices >= num_experts)).sum(-1, keepdim=True)
        return (hidden_states * share).to(hidden_states.dtype)

    custom_ops: Any = _custom_ops
    router: Any = zero_expert_router
    custom_ops.topk_softmax = topk_softmax
    router.zero_experts_compute_triton = return_tokens

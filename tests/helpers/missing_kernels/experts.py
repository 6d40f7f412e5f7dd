"""The products of experts."""

from typing import Any

import torch


def experts_without_a_gate() -> None:
    """Compute experts of two products and no gate, which the CPU's kernel does not know, one by one."""
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    experts: Any = cpu_moe.CPUUnquantizedExperts
    moe_config: Any = config.FusedMoEConfig
    knows, prepare, stock = (
        experts._supports_activation,
        experts.process_weights_after_loading,
        experts.apply,
    )
    check = moe_config.__post_init__

    def process_weights_after_loading(self: Any, layer: torch.nn.Module) -> None:
        if self.moe_config.is_act_and_mul:
            prepare(self, layer)

    def apply(
        self: Any,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        *others: Any,
        **named: Any,
    ) -> None:
        given = output, hidden_states, w1, w2, topk_weights, topk_ids, activation
        if activation.is_gated:
            stock(self, *given, *others, **named)
            return
        total = torch.zeros(output.shape)
        for expert in topk_ids.unique().tolist():
            token, choice = (topk_ids == expert).nonzero(as_tuple=True)
            inner = hidden_states[token] @ w1[expert].T
            apply_moe_activation(activation, inner, inner)
            outer = inner @ w2[expert].T
            total.index_add_(0, token, outer.float() * topk_weights[token, choice, None])
        output.copy_(total)

    def post_init(self: Any) -> None:
        try:
            check(self)
        except NotImplementedError:  # the last word of the check, when everything is set
            assert not self.is_act_and_mul

    moe_config.__post_init__ = post_init
    experts._supports_no_act_and_mul = staticmethod(lambda: True)
    experts._supports_activation = staticmethod(
        lambda activation: knows(activation) or not activation.is_gated
    )
    experts.process_weights_after_loading = process_weights_after_loading
    experts.apply = apply

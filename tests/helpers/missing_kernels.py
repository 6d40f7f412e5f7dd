"""Operations that vLLM has for GPUs only, in torch, so that the models that need one run on a CPU.

Each function of `STAND_INS` puts its sentences in the place of one operation, in stock engines and in
ours alike; layers, loaders, routing modules and schedulers stay vLLM's. `environment` names those that
a program and every process of its engines shall have: a vLLM plugin in `kernel_plugins/` calls
`install` there.
"""

import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PLUGINS = Path(__file__).with_name("kernel_plugins")
NAMES = "DWDP_TEST_STAND_INS"
"""The environment variable that lists stand-ins, with commas between them."""


def environment(names: tuple[str, ...], others: Mapping[str, str]) -> dict[str, str]:
    """Return what makes a started program and all its engines' processes have these stand-ins.

    Args:
        others: variables that it gets beside; what they say of PYTHONPATH stays true.
    """
    found = others.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
    places = [str(ROOT), str(PLUGINS), *filter(None, [found])]
    return {**others, "PYTHONPATH": os.pathsep.join(places), NAMES: ",".join(names)}


def said(names: tuple[str, ...]) -> str:
    """Return what a row of a table says of a model that ran with them."""
    return f"with {' and '.join(names)} in torch".replace("_", " ")


def install() -> None:
    """Put the stand-ins that the environment names in their places, in this process from now on."""
    for name in filter(None, os.environ.get(NAMES, "").split(",")):
        STAND_INS[name]()


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


def the_convolution_of_one_token() -> None:
    """Give the convolution a prompt's only token with the strides that it checks.

    A slice of one row counts as contiguous whatever its strides are, so vLLM does not copy it.
    """
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    module: Any = gdn_attention
    stock = module._causal_conv1d_fwd_cpu

    def convolve(*, x: torch.Tensor, **others: Any) -> torch.Tensor:
        rows = torch.empty(x.shape[::-1], dtype=x.dtype).copy_(x.T)
        return stock(x=rows.T, **others)

    module._causal_conv1d_fwd_cpu = convolve


def mamba_1() -> None:
    """Scan a prompt by the recurrence itself, after convolutions with weights that are not packed."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.mamba import mamba_mixer
    from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update

    def scan(
        u: torch.Tensor,
        ssm_states: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        z: torch.Tensor,
        delta_bias: torch.Tensor,
        *,
        delta_softplus: bool,
        cache_indices: torch.Tensor,
        has_initial_state: torch.Tensor,
        query_start_loc: torch.Tensor,
        **others: Any,
    ) -> torch.Tensor:
        assert delta_softplus
        step = torch.nn.functional.softplus(delta.float() + delta_bias[:, None])
        out = torch.empty(u.shape[::-1])
        for number, (start, stop) in enumerate(itertools.pairwise(query_start_loc.tolist())):
            slot = cache_indices[number]
            state = ssm_states[slot].float() * has_initial_state[number]
            for token in range(start, stop):
                width = step[:, token, None]
                state = state * (width * A).exp() + width * u[:, token, None] * B[:, token].float()
                out[token] = state @ C[:, token].float() + D * u[:, token]
            ssm_states[slot] = state.to(ssm_states.dtype)
        return (out * torch.nn.functional.silu(z.T.float())).to(u.dtype).T

    def update(*given: torch.Tensor, **named: Any) -> None:
        *tensors, dt_bias = given  # the kernel of a head in place of that of several
        selective_state_update(*tensors, dt_bias=dt_bias, **named)

    custom_ops: Any = _custom_ops
    mixer: Any = mamba_mixer
    del custom_ops.causal_conv1d_weight_pack
    mixer.selective_scan_fn = scan
    mixer.selective_state_update = update


def the_rotary_embedding() -> None:
    """Call ERNIE-4.5-VL's rotary embedding on CPUs as it is called on GPUs: that is plain torch."""
    from vllm.model_executor.layers.rotary_embedding import ernie45_vl_rope

    embedding: Any = ernie45_vl_rope.Ernie4_5_VLRotaryEmbedding
    embedding.forward_cpu = embedding.forward_cuda


def blocks_of_latents() -> None:
    """Let latent attention on CPUs take large blocks of the KV cache, as blocks of 16 tokens."""
    from vllm.v1.attention.backends.mla import cpu_mla

    backend: Any = cpu_mla.CPUMLABackend
    backend.supports_block_size = classmethod(lambda cls, size: size is None or size % 16 == 0)


STAND_INS: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        routing_by_sigmoid,
        experts_without_a_gate,
        zero_experts,
        the_convolution_of_one_token,
        mamba_1,
        the_rotary_embedding,
        blocks_of_latents,
    )
}

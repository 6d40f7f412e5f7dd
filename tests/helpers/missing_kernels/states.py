"""Layers that keep a state: convolutions, Mamba and linear attention."""

import itertools
from typing import Any

import torch


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


def linear_attention() -> None:
    """Attend by a state of each head, which decays and takes a token in; norms are torch's own."""
    from vllm.model_executor.layers.mamba.linear import minimax_linear_attn
    from vllm.third_party.flash_linear_attention.ops import layernorm_guard

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slope: torch.Tensor,
        state: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `[heads, tokens, size]` see, and the state `[heads, size, size]` after them."""
        decay = (-slope.view(-1, 1, 1).float()).exp()
        seen = []
        for token in range(q.shape[1]):
            state = decay * state + k[:, token, :, None] * v[:, token, None]
            seen.append(q[:, token, None] @ state)
        return torch.cat(seen, 1), state

    def of_a_prompt(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slope: torch.Tensor,
        *,
        kv_history: torch.Tensor,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen, state = attend(q[0], k[0], v[0], slope, kv_history[0])
        return seen[None], state[None, :, None]

    def of_one_token(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        states: torch.Tensor,
        slope: torch.Tensor,
        slots: torch.Tensor,
        block_size: int,
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        for number, slot in enumerate(slots.tolist()):
            seen, state = attend(q[number], k[number], v[number], slope, states[slot])
            out[number] = seen
            states[slot] = state
        return out.flatten(1)

    def norm(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: None,
        eps: float,
        z: torch.Tensor | None = None,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        is_rms_norm: bool = False,
        activation: str = "swish",
    ) -> tuple[torch.Tensor, None, None]:
        assert bias is None and is_rms_norm and norm_before_gate
        groups = x.float().unflatten(-1, (-1, group_size or x.shape[-1]))
        normed = torch.nn.functional.rms_norm(groups, groups.shape[-1:], eps=eps).flatten(-2)
        gate = torch.ones(()) if z is None else z.float().sigmoid()
        if z is not None and activation != "sigmoid":
            gate = gate * z.float()
        return (normed * weight.float() * gate).to(x.dtype), None, None

    linear: Any = minimax_linear_attn
    linear.lightning_attention = of_a_prompt
    linear.linear_decode_forward_triton = of_one_token
    norms: Any = layernorm_guard
    norms.layer_norm_fwd = norm

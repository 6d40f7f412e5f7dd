"""Delta attention: Kimi's, and GLM's with a bound."""

import itertools
from typing import Any

import torch


def delta_attention() -> None:
    """Attend by a state of each head, token by token: it forgets what a key knew, and takes the new."""
    make_importable()
    from vllm.model_executor.layers.mamba.gdn import kimi_gdn_linear_attn
    from vllm.models.kimi_k3.nvidia import model
    from vllm.models.kimi_k3.nvidia.ops.third_party import kda
    from vllm.third_party.flash_linear_attention.ops.kda import FusedRMSNormGated

    def of_one_token(
        *,
        mixed_qkv: torch.Tensor,
        raw_g: torch.Tensor,
        raw_beta: torch.Tensor,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        lower_bound: None,
        initial_state: torch.Tensor,
        state_indices: torch.Tensor,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert lower_bound is None
        out = torch.empty(raw_g.shape, dtype=mixed_qkv.dtype)
        for number, slot in enumerate(state_indices.tolist()):
            q, k, v = mixed_qkv[number].view(3, 1, *raw_g.shape[2:])
            gates = raw_g[0, number, None], raw_beta[0, number, None]
            seen, state = attend(q, k, v, *gates, A_log, dt_bias, initial_state[slot].float())
            out[0, number] = seen[0].to(out.dtype)
            initial_state[slot] = state
        return out, initial_state

    made_for_gpus: Any = model
    made_for_gpus.maybe_init_gemm_rs_ar = lambda *given: False  # it imports what only GPUs have
    rule: Any = kda
    rule.chunk_kda_with_fused_gate = of_prompts
    rule.fused_recurrent_kda_packed_decode = of_one_token
    layer: Any = kimi_gdn_linear_attn
    layer.gather_initial_states = initial_states
    norm: Any = FusedRMSNormGated
    norm.forward_cpu = norm.forward_native


def bounded_delta_attention() -> None:
    """Attend as `delta_attention`, where a token forgets at most what the bound says (GLM-5.3-Flash)."""
    from vllm.models.glm5next.common import kda
    from vllm.third_party.flash_linear_attention.ops.kda import FusedRMSNormGated

    def of_tokens(
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor,
        cu_seqlens: torch.Tensor,
        ssm_state_indices: torch.Tensor,
        a_log: torch.Tensor,
        g_bias: torch.Tensor,
        lower_bound: float,
        out: torch.Tensor | None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slots = ssm_state_indices[: len(cu_seqlens) - 1]
        seen, initial_state[slots] = of_prompts(
            q=q,
            k=k,
            v=v,
            raw_g=g,
            beta=beta,
            A_log=a_log,
            g_bias=g_bias,
            lower_bound=lower_bound,
            initial_state=initial_state[slots],
            cu_seqlens=cu_seqlens,
        )
        return seen if out is None else out.copy_(seen), initial_state

    def scatter_states(states: torch.Tensor, found: torch.Tensor, slots: torch.Tensor) -> None:
        states[slots] = found.to(states.dtype)

    layer: Any = kda
    layer.chunk_kda_with_fused_gate = of_prompts
    layer.fused_recurrent_kda = of_tokens
    layer.gather_initial_states = initial_states
    scatter: Any = scatter_states
    scatter.register_warmup = layer.scatter_states.register_warmup
    layer.scatter_states = scatter
    layer._cast_sigmoid = lambda beta: beta  # `attend` does it
    norm: Any = FusedRMSNormGated
    norm.forward_cpu = norm.forward_native


def delta_attention_of_ready_gates() -> None:
    """Attend as `bounded_delta_attention`, where layers compute the gates before (Ling-3)."""
    from vllm.model_executor.models import bailing_moe_v3
    from vllm.third_party.flash_linear_attention.ops.kda import FusedRMSNormGated

    def gate(
        raw_g: torch.Tensor,
        A_log: torch.Tensor,
        size: int,
        *,
        g_bias: torch.Tensor,
        lower_bound: float | None,
    ) -> torch.Tensor:
        return log_kept(raw_g.unflatten(-1, (-1, size)), A_log.flatten(), g_bias, lower_bound)

    def of_tokens(
        *, initial_state: torch.Tensor, ssm_state_indices: torch.Tensor, **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slots = ssm_state_indices[: len(others["cu_seqlens"]) - 1]
        seen, initial_state[slots] = of_sequences(initial_state=initial_state[slots], **others)
        return seen, initial_state

    layer: Any = bailing_moe_v3
    layer.fused_kda_gate = gate
    layer.chunk_kda = of_sequences
    layer.fused_recurrent_kda = of_tokens
    norm: Any = FusedRMSNormGated
    norm.forward_cpu = norm.forward_native


def of_prompts(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    raw_g: torch.Tensor,
    beta: torch.Tensor | None = None,
    raw_beta: torch.Tensor | None = None,
    A_log: torch.Tensor,
    g_bias: torch.Tensor,
    lower_bound: float | None,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what tokens `[1, tokens, heads, size]` see, and the state after each sequence.

    Args:
        beta, raw_beta: the same, as Kimi and GLM call it.
    """
    raw_beta = raw_beta if beta is None else beta
    assert raw_beta is not None
    gates = {
        "g": log_kept(raw_g[0], A_log.flatten(), g_bias, lower_bound).unsqueeze(0),
        "beta": raw_beta.float().sigmoid(),
    }
    return of_sequences(q=q, k=k, v=v, **gates, initial_state=initial_state, cu_seqlens=cu_seqlens)


def of_sequences(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `of_prompts` does, with ready gates."""
    out, states = torch.empty_like(v), torch.empty_like(initial_state)
    for number, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        tokens = [each[0, start:stop] for each in (q, k, v, g, beta)]
        seen, states[number] = recur(*tokens, initial_state[number].float())
        out[0, start:stop] = seen.to(out.dtype)
    return out, states


def initial_states(
    states: torch.Tensor, slots: torch.Tensor, has_initial_state: torch.Tensor
) -> torch.Tensor:
    """Return the states of sequences, zero of those that begin."""
    return states[slots] * has_initial_state.view(-1, *[1] * (states.dim() - 1))


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    raw_g: torch.Tensor,
    raw_beta: torch.Tensor,
    A_log: torch.Tensor,
    bias: torch.Tensor,
    state: torch.Tensor,
    lower_bound: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `[tokens, heads, size]` see, and the state `[heads, size, size]` after them.

    Args:
        lower_bound: of the logarithm of what is kept; None if there is none.
    """
    return recur(
        q, k, v, log_kept(raw_g, A_log, bias, lower_bound), raw_beta.float().sigmoid(), state
    )


def log_kept(
    raw_g: torch.Tensor, A_log: torch.Tensor, bias: torch.Tensor, lower_bound: float | None
) -> torch.Tensor:
    """Return the logarithm of what each element of `[tokens, heads, size]` keeps of the state."""
    gate, factor = raw_g.float() + bias.view(raw_g.shape[1:]), A_log.exp()[:, None]
    if lower_bound is None:
        return -factor * torch.nn.functional.softplus(gate)
    return lower_bound * (factor * gate).sigmoid()


def recur(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `attend` does, with ready gates."""
    q, k = (torch.nn.functional.normalize(each.float(), dim=-1) for each in (q, k))
    kept, seen = g.exp(), []
    for token in range(q.shape[0]):
        state = state * kept[token, :, :, None]
        known = (state * k[token, :, :, None]).sum(1)
        new = beta[token, :, None] * (v[token].float() - known)
        state = state + k[token, :, :, None] * new[:, None]
        seen.append((state * q[token, :, :, None]).sum(1) * q.shape[-1] ** -0.5)
    return torch.stack(seen), state


def make_importable() -> None:
    """Let a process import Kimi's modules, which are made for GPUs."""
    from vllm.triton_utils import dispatcher

    def of_vars(value: Any) -> dict[str, Any]:
        found = vars(value)
        return found if isinstance(found, dict) else {}

    search: Any = dispatcher
    search.vars = of_vars  # it looks into every object of every module, llvmlite's library too
    cuda: Any = torch.cuda
    cuda.Stream = type("Stream", (), {})

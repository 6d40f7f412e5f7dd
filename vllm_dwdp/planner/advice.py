"""What `plan` recommends, in sentences."""

from collections.abc import Iterator

from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.estimates import (
    Tokens,
    Traffic,
    auto_step,
    break_even_tokens,
    kv_tokens,
    memory_bytes,
    redundancy,
    replica_fits,
    replica_kv_bytes,
    speedups,
)

DECODE_HEAVY = 4
"""A request is decode-heavy from one generated token per so many prompt tokens."""
SLOWER = 1.1
"""Decode time over expert parallelism's from which prefill should be separated from it."""


def advise(model: CostModel, traffic: Traffic) -> Iterator[str]:
    """Every sentence that holds for this model, machine and traffic."""
    yield from _about_memory(model)
    yield from kv_shortage(model, int(traffic.decode_step.mean_keys), traffic.batch_size)
    yield from _about_steps(model, traffic)
    yield from _about_gains(model, traffic)


def lacking_memory(model: CostModel) -> Iterator[str]:
    """Where the weights of a rank do not fit."""
    left = memory_bytes(model)["KV cache"]
    if left <= 0:
        yield (
            f"It does not fit: a rank lacks {-left / 1e9:.0f} GB. Use more ranks per group or smaller "
            "experts (quantisation)."
        )


def kv_shortage(model: CostModel, context_tokens: int, num_sequences: int) -> Iterator[str]:
    """Where sequences need more KV cache than a rank has beside its weights."""
    room, needed = kv_tokens(model, context_tokens), num_sequences * context_tokens
    if 0 < room < needed:
        yield (
            f"{num_sequences:,} sequence{'s' * (num_sequences > 1)} of {context_tokens:,} tokens need a "
            f"KV cache of {needed:,} tokens, and {room:,.0f} fit a rank: the figures need more than "
            "there is."
        )


def _about_memory(model: CostModel) -> Iterator[str]:
    yield from lacking_memory(model)
    if replica_fits(model):
        yield (
            "A full replica fits one accelerator: plain data parallelism (dwdp mode 'replica') is "
            "faster. DWDP pays off here only if room for the KV cache is the point: "
            f"{memory_bytes(model)['KV cache'] / 1e9:.0f} GB instead of "
            f"{replica_kv_bytes(model) / 1e9:.0f} GB per rank."
        )


def _about_steps(model: CostModel, traffic: Traffic) -> Iterator[str]:
    needed = break_even_tokens(model, traffic.input_tokens)
    if needed.number is not None and traffic.max_num_batched_tokens < needed.number:
        yield (
            f"max_num_batched_tokens={traffic.max_num_batched_tokens} is below the break-even of "
            f"{needed.number} tokens: every prefill step waits for its experts. Raise it, share over "
            "fewer ranks or hold more experts per rank (experts_per_rank)."
        )
    if needed.instead.startswith("never"):
        yield (
            "No prefill step computes long enough to hide its copies: share over fewer ranks, hold more "
            "experts per rank (experts_per_rank), or use a faster link."
        )
    step = traffic.decode_step
    slower = auto_step(model, step) / model.dep_step(step)
    if traffic.output_tokens * DECODE_HEAVY > traffic.input_tokens and slower > SLOWER:
        yield (
            "The traffic is decode-heavy, and a decode step computes too little to hide the copies "
            f"({slower:.1f}x the time of expert parallelism): separate prefill from decode, with DWDP "
            "on the prefill side."
        )


def _about_gains(model: CostModel, traffic: Traffic) -> Iterator[str]:
    values = speedups(model, traffic)
    low, high = min(values.values()), max(values.values())
    if high < 1:
        yield f"DWDP is slower than DEP here, {low:.2f} to {high:.2f}x: keep expert parallelism."
    elif round(low, 2) < 1:
        yield (
            f"With balanced load DWDP is slower than DEP here ({low:.2f}x); it pays off only by what "
            "uneven lengths and routing cost DEP."
        )
    else:
        yield f"DWDP is {low:.2f} to {high:.2f}x as fast as DEP in prefill."
    spare, saved, tokens = redundancy(model, traffic)
    if spare:
        yield (
            f"Spare memory would hold {spare} more experts per layer and rank (experts_per_rank="
            f"{model.resident_experts + spare}): {100 * saved:.0f} % of the copies less"
            f"{_break_even(tokens)}, at the price of KV cache."
        )


def _break_even(tokens: Tokens) -> str:
    return "" if tokens.number is None else f", break-even at {tokens.number} tokens"

"""What `plan` recommends, in sentences."""

from collections.abc import Iterator

from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.estimates import (
    Traffic,
    break_even_tokens,
    memory_bytes,
    redundancy,
    replica_fits,
    replica_kv_bytes,
    speedups,
)

DECODE_HEAVY = 4
"""A request is decode-heavy from one generated token per so many prompt tokens."""


def advise(model: CostModel, traffic: Traffic) -> Iterator[str]:
    """Every sentence that holds for this model, machine and traffic."""
    yield from _about_memory(model)
    yield from _about_steps(model, traffic)
    yield from _about_gains(model, traffic)


def _about_memory(model: CostModel) -> Iterator[str]:
    left = memory_bytes(model)["KV cache"]
    if left <= 0:
        yield (
            f"It does not fit: a rank lacks {-left / 1e9:.0f} GB. Use more ranks per group or smaller "
            "experts (quantisation)."
        )
    if replica_fits(model):
        yield (
            "A full replica fits one accelerator: plain data parallelism (dwdp mode 'replica') is "
            f"faster. DWDP pays off here only if room for the KV cache is the point: {left / 1e9:.0f} "
            f"GB instead of {replica_kv_bytes(model) / 1e9:.0f} GB per rank."
        )


def _about_steps(model: CostModel, traffic: Traffic) -> Iterator[str]:
    needed = break_even_tokens(model, traffic.input_tokens)
    if traffic.max_num_batched_tokens < needed:
        yield (
            f"max_num_batched_tokens={traffic.max_num_batched_tokens} is below the break-even of "
            f"{needed} tokens: every prefill step waits for its experts. Raise it, share over fewer "
            "ranks or hold more experts per rank (experts_per_rank)."
        )
    if traffic.output_tokens * DECODE_HEAVY > traffic.input_tokens:
        step = traffic.decode_step
        slower = model.dwdp_layer(step) / model.dep_layer(step)
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
    elif low < 1:
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
            f"{model.resident_experts + spare}): {100 * saved:.0f} % of the copies less, break-even at "
            f"{tokens} tokens, at the price of KV cache."
        )

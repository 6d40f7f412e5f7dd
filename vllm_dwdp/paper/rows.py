"""All rows, what is missing, and why a row is missed."""

from vllm_dwdp.paper import deployments, kernels
from vllm_dwdp.paper.factors import Row

NUM_NOT_MODELLED = 10
NOT_MODELLED = (
    (
        f"end to end, time to first token, {NUM_NOT_MODELLED} figures",
        "milliseconds that hang on the offered rate and the number of context servers, which are not "
        "stated",
    ),
)
"""What the model does not speak to: counted as published, not as a row."""

_REASONS = (
    (
        "DenseGEMM",
        "",
        "what copies cost is spread evenly over attention, dense products and the rest; measured, the "
        "dense products suffer less",
    ),
    (
        "synchronisation tax [B]",
        "",
        "the two sources differ, 12 and 10 %; the model gives one value",
    ),
    (
        "context only",
        "TTFT, ISL 1024",
        "the model has one gain for throughput and time to first token; the published two differ most "
        "with many short prompts, so something beside the steps is measured there",
    ),
    (
        "context only",
        "ISL 32768",
        "one prompt fills a step: the 20 % variation that the model adds to it cannot occur",
    ),
    (
        "context only, by STD",
        "TPS/GPU",
        "the published pair differs by 3 %, and the model has one gain for both",
    ),
    (
        "slices",
        "MNT 16384",
        "steps just long enough to hide the copies: whole prompts fill them badly (2 of 6,144 tokens "
        "in 16,384), so the model exposes copies that other batching would hide",
    ),
    (
        "SGLang",
        "",
        "another engine, whose kernels and batching were not published; the published gain rises and "
        "falls with the length, the model's does not",
    ),
    (
        "end to end",
        "TPS/user",
        "the published points compare different operating points: starved generation servers decode "
        "smaller batches; the model keeps the batch",
    ),
    (
        "end to end",
        "TPS/GPU",
        "published is a loss, and a model that changes the context servers only cannot give one; its "
        "generation servers also pay no latencies, so that the few sequences of this point decode too "
        "fast and the context servers weigh too much",
    ),
)


def paper_rows() -> list[Row]:
    """List all rows, in the order of the paper."""
    return [
        *kernels.roofline(),
        *kernels.contention_rows(),
        *kernels.bounds(),
        *kernels.synchronisation(),
        *kernels.breakdown(),
        *deployments.context_only(),
        *deployments.slicing(),
        *deployments.sglang(),
        *deployments.end_to_end(),
    ]


NUM_ROWS = 103
NUM_PUBLISHED = NUM_ROWS + NUM_NOT_MODELLED
"""Figures of the published tables and texts, those that repeat another table's included."""


def why_missed(row: Row) -> str:
    """Return the reason why a row is not reached."""
    name = f"{row.source}: {row.quantity}"
    for source, quantity, reason in _REASONS:
        if source in name and quantity in row.quantity:
            return reason
    return "unexplained"

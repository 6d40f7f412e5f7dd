"""The chunk curve of another vendor's machine: which chunks lose, and which may win.

[A] SGLang's AMD branch: DeepSeek-R1 in MXFP4, prefill on eight MI355X, DWDP8 over DEP8. Seven ratios
are published, by input length and chunk, but not what a step held: whether prompts were batched, and
whether a chunk is a rank's or the server's, which divides it over its ranks. So they are no rows of the
count. The model takes the data sheet and the efficiencies of the one GB200 breakdown, and reads a chunk
as one rank's, full.
"""

from collections.abc import Iterator

from vllm_dwdp.paper.factors import DEEPSEEK_R1, Row
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.hardware import DEFAULT, Hardware
from vllm_dwdp.planner.model_shape import shape_of
from vllm_dwdp.planner.step import Step

MI355X = Hardware(
    name="mi355x",
    bf16_tflops=2516.6,
    fp8_tflops=5033.2,
    fp4_tflops=10066.3,
    memory_gb=288,
    memory_gbps=8000,
    link_gbps=537.6,  # seven links of 76.8 in one direction, one to each peer
)
"""Data sheet. No entry of `hardware.toml`: the plugin has no device for it."""

PUBLISHED = (
    (4096, ((4096, 0.34), (8192, 0.32), (16384, 0.385))),
    (32768, ((4096, 0.579), (8192, 0.529), (16384, 1.209), (32768, 1.637))),
)
"""By chunk: input tokens, and DWDP over DEP."""

DIFFERENCES = (
    "Chunks of 4,096: nothing here was fitted on this machine, and a step that is full of one prompt "
    "leaves little open: the copies take longer than everything else.",
    "Chunks of 32,768 with inputs of 4,096 and 8,192: published is a loss, as of a step that holds one "
    "or two prompts; the model fills the step.",
    "Chunks of 32,768 with inputs of 16,384 and 32,768: published is more than the model's whole "
    "compute and exchange allow, so the expert parallelism there waited for something that is not "
    "modelled.",
)
"""Between the model and what is published, by chunk."""


def mi355x_model() -> CostModel:
    """Model DeepSeek-R1 on eight of them: experts in MXFP4, everything else in FP8."""
    return CostModel(
        shape=shape_of(DEEPSEEK_R1, "mxfp4"), hardware=MI355X, efficiency=DEFAULT, group_size=8
    )


def full_step_gain(model: CostModel, input_tokens: int, chunk: int) -> float:
    """Return DWDP over DEP of a full prefill step, balanced."""
    step = Step.prefill(chunk, input_tokens)
    return model.dep_step(step) / model.dwdp_step(step)


def chunk_curve(input_tokens: int) -> dict[str, tuple[list[float], list[float]]]:
    """Return chunks and ratios, of the model and as published, for prompts of that length."""
    model = mi355x_model()
    chunks = [2.0 ** (exponent / 2) for exponent in range(22, 33)]
    seen = {chunk: dict(ratios).get(input_tokens) for chunk, ratios in PUBLISHED}
    known = {float(chunk): ratio for chunk, ratio in seen.items() if ratio is not None}
    return {
        "model": (chunks, [full_step_gain(model, input_tokens, round(one)) for one in chunks]),
        "published": (list(known), list(known.values())),
    }


def chunk_rows() -> Iterator[Row]:
    """List the published ratios beside the model's."""
    model = mi355x_model()
    for chunk, ratios in PUBLISHED:
        for input_tokens, seen in ratios:
            yield Row(
                source="chunk curve, DeepSeek-R1, MI355X x8 [A]",
                quantity=f"throughput, chunks of {chunk}, ISL {input_tokens}",
                published=seen,
                model=full_step_gain(model, input_tokens, chunk),
                kind="default",
            )

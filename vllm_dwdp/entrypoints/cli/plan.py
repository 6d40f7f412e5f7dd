"""`vllm-dwdp plan`."""

from dataclasses import replace
from typing import Annotated

import typer

from vllm_dwdp.entrypoints.cli.options import (
    AsJson,
    DenseDtype,
    Dtypes,
    ExpertDtype,
    Gpu,
    HardwareFile,
    KvDtype,
    Model,
    Png,
    cost_model,
)
from vllm_dwdp.entrypoints.pictures.draw import PngFile
from vllm_dwdp.entrypoints.pictures.planner import plan_pictures
from vllm_dwdp.entrypoints.tables import figure, print_json, say, show
from vllm_dwdp.planner.adapters import Slots
from vllm_dwdp.planner.checked import whole
from vllm_dwdp.planner.disaggregated import DECODE_GPUS
from vllm_dwdp.planner.disaggregated_plan import DecodeServers, Feeding, plan_feeding
from vllm_dwdp.planner.plan import Figure, make_plan
from vllm_dwdp.planner.traffic import Traffic


def plan(
    model: Model = None,
    gpu: Gpu = "gb200",
    ranks: Annotated[int, typer.Option(help="Ranks that share one copy.")] = 4,
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs of a rank.")] = 1,
    input_tokens: Annotated[int, typer.Option(help="Per request.")] = 8192,
    output_tokens: Annotated[int, typer.Option(help="Per request.")] = 1024,
    variation: Annotated[
        float,
        typer.Option(
            help="Standard deviation of a rank's tokens per step over their mean; near 0 where "
            "chunked prefill fills every step."
        ),
    ] = 0.2,
    max_num_batched_tokens: Annotated[int, typer.Option(help="vLLM's limit per step.")] = 16384,
    batch_size: Annotated[int, typer.Option(help="Sequences that decode together.")] = 64,
    experts_per_rank: Annotated[int, typer.Option(help="0: an even share.")] = 0,
    max_loras: Annotated[
        int, typer.Option(help="vLLM's: LoRA adapters in one batch. 0: none are served.")
    ] = 0,
    max_lora_rank: Annotated[int, typer.Option(help="vLLM's, of each of them.")] = 16,
    decode_servers: Annotated[
        int, typer.Option(help="Of launch: the ranks prefill for so many. 0: they decode too.")
    ] = 0,
    decode_gpus: Annotated[
        int, typer.Option(help="Of each decode server, which divide the experts.")
    ] = DECODE_GPUS,
    tokens_per_user: Annotated[
        float, typer.Option(help="Generated per second and user by the decode servers.")
    ] = 50.0,
    expert_dtype: ExpertDtype = "",
    dense_dtype: DenseDtype = "",
    kv_dtype: KvDtype = "",
    hardware: HardwareFile = None,
    as_json: AsJson = False,
    png: Png = None,
) -> None:
    """Say whether DWDP pays off, from a config.json, before renting anything.

    Every figure is marked: "config" and "spec" are counted from the model's config and the data sheet,
    "calibrated" ones were measured by calibrate, "default" ones rest on published efficiencies,
    "part default" ones on both, or on the assumptions that are printed last. In JSON a figure that there
    is none of has low and high null, and a reason.

    With --decode-servers it also says how many ranks feed them, with which chunk, and what is other
    than with expert-parallel prefill.

    Source: the roofline of arXiv 2604.01621, sections 3 and 4.3.1. Exits 2 where a config or an option
    cannot be planned with, and names it.
    """
    picture = PngFile(png)
    dtypes = Dtypes(experts=expert_dtype, dense=dense_dtype, kv_cache=kv_dtype)
    cost = cost_model(model, gpu, ranks, dtypes, hardware, experts_per_rank, tensor_parallel_size)
    slots = Slots(
        number=whole("--max-loras", max_loras, 0), rank=whole("--max-lora-rank", max_lora_rank, 1)
    )
    cost = replace(cost, adapters=slots)
    traffic = Traffic(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        variation=variation,
        max_num_batched_tokens=max_num_batched_tokens,
        batch_size=batch_size,
    )
    made = make_plan(cost, traffic)
    if decode_servers:
        servers = DecodeServers(
            number=decode_servers, num_gpus=decode_gpus, tokens_per_user=tokens_per_user
        )
        of_one_gpu = replace(cost_model(model, gpu, ranks, dtypes, hardware), adapters=slots)
        feeding = Feeding(model=cost, decode_model=of_one_gpu, traffic=traffic, servers=servers)
        made = made.and_then(plan_feeding(feeding))
    picture.write(lambda: plan_pictures(cost, traffic))
    if as_json:
        lines = [each.as_dict() for each in made.figures]
        print_json({"lines": lines, "advice": made.advice, "assumptions": made.assumptions})
        return
    topics = [each.topic for each in made.figures]
    rows = [
        ("" if each.topic == before else each.topic, each.quantity, _value(each), each.unit, each.origin)
        for before, each in zip(["", *topics], made.figures, strict=False)
    ]  # fmt: skip
    title = f"{cost.shape.name} on {ranks} x {cost.hardware.name} ({cost.hardware.source})"
    show(title, ("", "quantity", "value", "unit", "origin"), rows)
    say(*(f"- {sentence}" for sentence in made.advice))
    say("Assumed:", *(f"- {sentence}" for sentence in made.assumptions))


def _value(shown: Figure) -> str:
    if shown.low is None or shown.high is None:
        return shown.reason
    return figure(shown.low) if shown.low == shown.high else f"{shown.low:.2f} - {shown.high:.2f}"

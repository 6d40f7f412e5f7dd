"""Options that several commands share, and the cost model that they describe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import whole
from vllm_dwdp.planner.checkpoint import read_config
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.hardware import find_hardware
from vllm_dwdp.planner.model_shape import shape_of

Model = Annotated[Path | None, typer.Option(help="A model folder, or its config.json.")]
Gpu = Annotated[
    str, typer.Option(help="h100, h200, b200, gb200, gb300, epyc-2core, or one of --hardware.")
]
HardwareFile = Annotated[
    Path | None, typer.Option("--hardware", help="TOML of further ones, or of calibrate.")
]
ExpertDtype = Annotated[
    str,
    typer.Option(
        help="Of the routed experts; overrides the checkpoint's: bf16, fp8, int4, mxfp4, nvfp4, ..."
    ),
]
DenseDtype = Annotated[str, typer.Option(help="Of all other weights but the embeddings, likewise.")]
KvDtype = Annotated[str, typer.Option(help="Of the KV cache, likewise.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Png = Annotated[Path | None, typer.Option("--png", help="Write pictures to this PNG file.")]


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """What overrides the checkpoint's precision; empty where nothing does."""

    experts: str
    dense: str
    kv_cache: str


def cost_model(
    model: Path | None,
    gpu: str,
    ranks: int,
    dtypes: Dtypes,
    hardware: Path | None,
    experts_per_rank: int = 0,
    tensor_parallel_size: int = 1,
) -> CostModel:
    """Build the cost model that the options describe.

    Raises:
        DwdpConfigError: an option, the config.json or the hardware file is wrong.
    """
    if model is None:
        raise DwdpConfigError("--model is missing: give a model folder or its config.json.")
    whole("--ranks", ranks, 2)
    whole("--tensor-parallel-size", tensor_parallel_size, 1)
    shape = shape_of(
        read_config(model),
        dtypes.experts or None,
        dtypes.kv_cache or None,
        dtypes.dense or None,
        tensor_parallel_size,
    )
    even = -(-shape.num_experts // ranks)
    if experts_per_rank:
        whole("--experts-per-rank", experts_per_rank, even, shape.num_experts)
    found = find_hardware(gpu, hardware)
    return CostModel(
        shape=shape,
        hardware=found.times(tensor_parallel_size),
        efficiency=found.efficiency,
        group_size=ranks,
        extra_experts=max(0, experts_per_rank - even),
    )

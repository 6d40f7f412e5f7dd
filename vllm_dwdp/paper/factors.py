"""The published configurations, and every factor that was fitted, with its value and its rows."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_dwdp.planner.cost import CostModel, Exchange
from vllm_dwdp.planner.hardware import DEFAULT, PEAK, find_hardware
from vllm_dwdp.planner.model_shape import shape_of
from vllm_dwdp.planner.quantisation import FORMATS, Precision

TOLERANCE = 0.05


def _config(name: str) -> dict[str, Any]:
    """Read the fields of a published config.json that matter here."""
    path = Path(__file__).with_name("configs") / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


DEEPSEEK_R1, GPT_OSS_120B = _config("deepseek_r1"), _config("gpt_oss_120b")


@dataclass(frozen=True, kw_only=True)
class Factor:
    """One fitted number.

    Args:
        value: that the model uses.
        rows: it was fitted on.
        meaning: in words.
    """

    value: float
    rows: tuple[str, ...]
    meaning: str


_DEP4 = "breakdown, DEP4"
_DWDP4 = "breakdown, DWDP4 naive"
FITTED: Mapping[str, Factor] = {
    "attention": Factor(
        value=DEFAULT.attention, rows=(f"{_DEP4}: Attention",), meaning="of the bf16 peak"
    ),
    "grouped_gemm": Factor(
        value=DEFAULT.grouped_gemm, rows=(f"{_DEP4}: GroupedGEMM",), meaning="of the FP4 peak"
    ),
    "dense_gemm": Factor(
        value=DEFAULT.dense_gemm,
        rows=(f"{_DEP4}: DenseGEMM",),
        meaning="of the FP4 peak; in bf16 the published time would exceed the peak",
    ),
    "other_passes": Factor(
        value=DEFAULT.other_passes,
        rows=(f"{_DEP4}: Others",),
        meaning="passes over the hidden states of a layer at the memory's peak speed",
    ),
    "link": Factor(
        value=DEFAULT.link, rows=(f"{_DWDP4}: P2P copy",), meaning="of 900 GB/s: 643 GB/s"
    ),
    "beside_copies": Factor(
        value=DEFAULT.beside_copies,
        rows=("breakdown, DWDP4 without merge copy: Iteration",),
        meaning="speed of compute while copies flow",
    ),
    "merge_passes": Factor(
        value=1.0,
        rows=(f"{_DWDP4}: Merge copy",),
        meaning="passes over the remote experts at the memory's peak speed; chosen after the fact",
    ),
    "routing_skew": Factor(
        value=1.046,
        rows=(f"{_DEP4}: Synchronisation",),
        meaning="busiest expert-parallel rank over the mean, beside the published 20 % variation",
    ),
    "end_to_end": Factor(
        value=0.94,
        rows=tuple(
            f"context only, by ISL: {quantity}, ISL {tokens}"
            for tokens in (1024, 8192, 16384, 32768)
            for quantity in ("TTFT", "TPS/GPU")
        ),
        meaning="DWDP's gain in a deployment over its gain in kernels",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure and ours."""

    source: str
    quantity: str
    published: float
    model: float
    kind: str

    @property
    def error(self) -> float:
        """The relative error."""
        return self.model / self.published - 1

    @property
    def is_reached(self) -> bool:
        """Whether the model is within TOLERANCE."""
        return abs(self.error) <= TOLERANCE

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON."""
        return asdict(self)


DERIVED: Mapping[str, str] = {
    "breakdown, DEP4: Iteration": "the sum of six rows, five of them fitted",
    "breakdown, DWDP4 naive: Iteration": "the iteration without merge copy, and the merge copy",
    "breakdown, DWDP4 without merge copy: P2P copy": "repeats that of DWDP4 naive",
    "synchronisation tax [P]: waiting in a DEP step, CV 20 %, %": "synchronisation over iteration",
    "context only, by MNT: TTFT, MNT 32768": "repeats ISL 8192",
    "context only, by MNT: TPS/GPU, MNT 32768": "repeats ISL 8192",
}
"""Rows that follow from fitted ones, so that meeting them says little more, and how."""


def row(source: str, quantity: str, published: float, model: float, kind: str = "") -> Row:
    """Make a row: `fitted` if FITTED names it, `derived` if DERIVED does, else `default`.

    Args:
        kind: in place of these.
    """
    name = f"{source}: {quantity}"
    is_fitted = any(name in factor.rows for factor in FITTED.values())
    found = "fitted" if is_fitted else "derived" if name in DERIVED else "default"
    return Row(
        source=source, quantity=quantity, published=published, model=model, kind=kind or found
    )


def roofline_model() -> CostModel:
    """Model DeepSeek-R1 on four GB200 at data-sheet peaks; projections in bf16, as in the roofline."""
    return CostModel(
        shape=replace(
            shape_of(DEEPSEEK_R1, "nvfp4"), shared_precision=Precision.of(FORMATS["nvfp4"])
        ),
        hardware=find_hardware("gb200"),
        efficiency=PEAK,
        group_size=4,
        exchange=Exchange.PER_EXPERT,
    )


def r1_model(group_size: int = 4) -> CostModel:
    """Model DeepSeek-R1 on GB200, all linear weights in NVFP4, as the published kernel times imply."""
    return CostModel(
        shape=shape_of(DEEPSEEK_R1, "nvfp4", dense_dtype="nvfp4"),
        hardware=find_hardware("gb200"),
        efficiency=DEFAULT,
        group_size=group_size,
    )


def gpt_oss_model() -> CostModel:
    """Model gpt-oss-120b on four B200; SGLang gathers all tokens on all ranks."""
    return CostModel(
        shape=shape_of(GPT_OSS_120B),
        hardware=find_hardware("b200"),
        efficiency=DEFAULT,
        group_size=4,
        exchange=Exchange.ALL_GATHER,
    )

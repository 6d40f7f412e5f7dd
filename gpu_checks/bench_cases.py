"""What `gpu_checks.bench` measures: shapes of known models, and where the peers' experts lie."""

from dataclasses import dataclass, replace

import torch

from gpu_checks.expert_ranks import ExpertShape

MODES = ("eager", "piecewise", "full")
NUM_LAYERS = 4  # even, so that the two slots alternate across the end of a step as well

SHAPES = {
    "qwen3-30b-a3b": ExpertShape(num_experts=128, hidden_size=2048, intermediate_size=768, top_k=8),
    "mixtral-8x7b": ExpertShape(num_experts=8, hidden_size=4096, intermediate_size=14336, top_k=2),
    "gpt-oss-20b": ExpertShape(num_experts=32, hidden_size=2880, intermediate_size=2880, top_k=4),
    # 64 of its 256 experts: all of them take 22.5 GB a layer in bf16.
    "deepseek-v3/64": ExpertShape(
        num_experts=64, hidden_size=7168, intermediate_size=2048, top_k=8
    ),
}
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape on one way to the peers.

    Args:
        on_host: whether the peers' experts lie in pinned host memory.
        experts_per_rank: resident ones; None for an even share.
    """

    shape: ExpertShape
    group_size: int
    tokens: tuple[int, ...]
    on_host: bool = False
    experts_per_rank: int | None = None


def all_cases(*, toy: bool = False) -> dict[str, Case]:
    """Name every shape and type within the device, and two of them from the host.

    Args:
        toy: small enough for a CPU.
    """
    cases = {
        f"{name}-{dtype}": Case(
            shape=replace(shape, dtype=DTYPES[dtype]), group_size=4, tokens=(4, 64, 1024, 8192)
        )
        for dtype in DTYPES
        for name, shape in SHAPES.items()
    }
    # Redundant ranks, so that few experts are remote and a copy over PCIe takes milliseconds.
    cases["qwen3-30b-a3b-bf16-host"] = Case(
        shape=SHAPES["qwen3-30b-a3b"],
        group_size=2,
        tokens=(16, 4096, 16384, 32768),
        on_host=True,
        experts_per_rank=112,
    )
    cases["mixtral-8x7b-bf16-host"] = Case(
        shape=SHAPES["mixtral-8x7b"],
        group_size=2,
        tokens=(16, 2048, 8192, 16384),
        on_host=True,
        experts_per_rank=7,
    )
    return {name: _toy(case) for name, case in cases.items()} if toy else cases


def _toy(case: Case) -> Case:
    """Shrink a case, with experts of more than a page where a rank lacks only one of them."""
    hidden, intermediate = (1024, 1280) if case.on_host else (256, 320)
    intermediate *= torch.bfloat16.itemsize // case.shape.dtype.itemsize  # or no page is remote
    shape = replace(
        case.shape,
        num_experts=8,
        hidden_size=hidden,
        intermediate_size=intermediate,
        top_k=2,
    )
    per_rank = 7 if case.on_host else None
    return replace(case, shape=shape, group_size=2, tokens=(4, 33), experts_per_rank=per_rank)

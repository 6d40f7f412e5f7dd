"""vLLM's quantised MoE kernels on processors that can run them but are not asked to.

vLLM offers its CPU kernels for FP8, int8, int4 and MXFP4 experts to processors with AMX only; they are
compiled for AVX512-BF16 as well. `open_gates` offers them there too, to stock engines and to ours: what
runs are vLLM's own processing and kernels. `environment` makes a started program, and every process of
its engines, do the same: a vLLM plugin in `plugins/` calls `open_gates`.
"""

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLUGINS = Path(__file__).with_name("plugins")
GATED = ("CPUExpertsFp8", "CPUExpertsInt4", "CPUExpertsInt8", "CPUExpertsMxfp4")
"""Classes of vLLM's `cpu_moe` that ask for AMX."""


def why_not() -> str | None:
    """Say what this processor lacks for the kernels; None if it runs them."""
    import torch

    if torch.cpu._is_avx512_bf16_supported():
        return None
    return "this processor has no AVX512-BF16, which vLLM's quantised CPU kernels need"


def open_gates() -> None:
    """Let vLLM choose the kernels in this process from now on."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    for name in GATED:
        getattr(cpu_moe, name)._supports_current_device = staticmethod(_is_supported)
    cpu_moe.fused_experts_cpu = as_compiled(_custom_ops.fused_experts_cpu)


def as_compiled(stock: Callable[..., None]) -> Callable[..., None]:
    """Return what calls the kernel for experts with the arguments that it was compiled for.

    `other_vllm` puts the Python of a newer vLLM over older compiled parts. Since 0.33 the activation is
    an argument; before, the kernel took the one of gpt-oss wherever it was given an `alpha`.
    """
    import torch

    kernel = torch.ops._C.fused_experts_cpu
    takes = [argument.name for argument in kernel.default._schema.arguments]
    given = inspect.signature(stock)
    if set(takes) == set(given.parameters):
        return stock

    @functools.wraps(stock)
    def call(*args: Any, **kwargs: Any) -> None:
        bound = given.bind(*args, **kwargs)
        bound.apply_defaults()
        activation = bound.arguments["act_method"].name
        compiled = "SILU_AND_MUL" if bound.arguments["alpha"] is None else "SWIGLU"
        assert activation == compiled, f"{activation}, and the compiled kernel takes {compiled}"
        kernel(*(bound.arguments[name] for name in takes))

    return call


def environment() -> dict[str, str]:
    """Return what to add to a program's environment so that its engines' gates are open."""
    found = os.environ.get("PYTHONPATH")
    places = [str(ROOT), str(PLUGINS), *([found] if found else [])]
    return {"PYTHONPATH": os.pathsep.join(places)}


def _is_supported() -> bool:
    return why_not() is None

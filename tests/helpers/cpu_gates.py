"""vLLM's quantised MoE kernels on processors that can run them but are not asked to.

vLLM offers its CPU kernels for FP8, int8, int4 and MXFP4 experts to processors with AMX only; they are
compiled for AVX512-BF16 as well. `open_gates` offers them there too, to stock engines and to ours: what
runs are vLLM's own processing and kernels. `environment` makes a started program, and every process of
its engines, do the same: a vLLM plugin in `plugins/` calls `open_gates`.
"""

import os
from pathlib import Path

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
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    for name in GATED:
        getattr(cpu_moe, name)._supports_current_device = staticmethod(_is_supported)


def environment() -> dict[str, str]:
    """Return what to add to a program's environment so that its engines' gates are open."""
    found = os.environ.get("PYTHONPATH")
    places = [str(ROOT), str(PLUGINS), *([found] if found else [])]
    return {"PYTHONPATH": os.pathsep.join(places)}


def _is_supported() -> bool:
    return why_not() is None

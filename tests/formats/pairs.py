"""Which kernels vLLM has for a quantisation method, and why some have no case here."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tests.formats.layers import Choice, asked, oracle_modules

AMD = "for AMD GPUs only"
INTEL = "for Intel GPUs only"
OTHER_PROCESSOR = "for other processors"
B12X = "the b12x package converts the weights"
HUMMING = "the humming package, which compiles kernels on a GPU, converts the weights"
EXPERT_PARALLEL = "needs expert parallelism, which ranks that share experts refuse"
ELSEWHERE = {
    "AITER": AMD,
    "AITER_MXFP8": AMD,
    "AITER_MXFP4_BF16": AMD,
    "AITER_TRITON_MXFP4_BF16": AMD,
    "AITER_MXFP4_FP8": AMD,
    "AITER_MXFP4_MXFP4": AMD,
    "RDNA3": AMD,
    "XPU": INTEL,
    "TPU": OTHER_PROCESSOR,
    "OOT": "for platforms of other plugins",
    "ZEN_CPU": "needs zentorch (tests/e2e/test_zentorch.py)",
    "B12X": B12X,
    "B12X_MXFP4_MXFP8": B12X,
    "B12X_MXFP4_BF16": B12X,
    "HUMMING": HUMMING,
    "MOONEP": EXPERT_PARALLEL,
    "FLASHINFER_MOE_EP_CUTEDSL": EXPERT_PARALLEL,
    "FLASHINFER_MOE_EP_DEEP_GEMM": EXPERT_PARALLEL,
}
"""Backends, by name, that nothing here can stand for."""
ELSEWHERE_KERNELS = {
    "ZenCPUExpertsInt8": "needs zentorch (tests/e2e/test_zentorch.py)",
    "ArmCPUExpertsInt8": OTHER_PROCESSOR,
    "PowerCPUExpertsInt8": OTHER_PROCESSOR,
    "ArmCPUUnquantizedExperts": OTHER_PROCESSOR,
    "PowerCPUUnquantizedExperts": OTHER_PROCESSOR,
}


class Own(Enum):
    """In the place of a backend, for methods that ask no oracle."""

    BY_DEVICE = "BY_DEVICE"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A method with a kernel of a backend; `why_not` says why it has no case."""

    method: str
    backend: str
    kernel: str
    choice: Choice | None
    why_not: str | None = None


def pairs_of(method: str) -> Iterator[Pair]:
    """Every backend of the oracle that the method asks, with the kernels that take its numbers."""
    question = asked(method)
    if question is None:
        own = Choice(oracle="", backend=Own.BY_DEVICE, experts=None)
        yield Pair(method=method, backend="its own", kernel="by device", choice=own)
        return
    oracle, weights, activations = question
    module = oracle_modules()[oracle]
    for backend, kernels in _kernels(oracle, module):
        for kernel in kernels:
            wanted = _keys(oracle, module, backend, weights, activations)
            if not kernel._supports_quant_scheme(*wanted):
                continue
            why_not = ELSEWHERE.get(backend.name) or ELSEWHERE_KERNELS.get(kernel.__name__)
            if why_not is None and _is_batched(kernel):
                why_not = EXPERT_PARALLEL
            choice = Choice(oracle=oracle, backend=backend, experts=kernel)
            yield Pair(
                method=method,
                backend=backend.name,
                kernel=kernel.__name__,
                choice=None if why_not else choice,
                why_not=why_not,
            )


def _kernels(oracle: str, module: Any) -> Iterator[tuple[Enum, list[type]]]:
    """Yield the backends of an oracle and their kernels, without backends that name none."""
    if oracle == "mxfp8":
        backends, resolve = list(module._SUPPORTED_BACKENDS), module._mxfp8_backend_to_kernel_cls
    else:
        (kind,) = (
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, Enum)
            and value.__module__ == module.__name__
        )
        backends, resolve = list(kind), module.backend_to_kernel_cls
    for backend in backends:
        try:
            yield backend, resolve(backend)
        except ValueError:
            continue


def _keys(
    oracle: str, module: Any, backend: Enum, weights: Any, activations: Any
) -> tuple[Any, Any]:
    """Return what vLLM asks a kernel for; some oracles fill in what the method leaves out."""
    from vllm.model_executor.layers.quantization.utils import quant_utils

    if oracle == "mxfp8":
        return quant_utils.kMxfp8Static, quant_utils.kMxfp8Dynamic
    if oracle == "mxfp4":
        return quant_utils.kMxfp4Static, module._backend_activation_key(backend)
    if oracle == "w4a8":
        return quant_utils.kInt4Static, quant_utils.kFp8DynamicTokenSym
    return weights, activations


def _is_batched(kernel: Any) -> bool:
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEActivationFormat

    try:
        return bool(kernel.activation_format() == FusedMoEActivationFormat.BatchedExperts)
    except TypeError:  # one that asks its parts, once it is built
        return False

"""Which parameters of a fused-MoE layer are per expert, declared per quantisation method.

Declared, not guessed: a parameter that nobody looked at could be a global maximum over the local
experts, and sharing it would be silently wrong. An undeclared method or parameter stops the start.
"""

from collections.abc import Iterator
from typing import Any

import torch

from vllm_dwdp.errors import DwdpUnsupportedError

PER_EXPERT: dict[str, frozenset[str]] = {
    "UnquantizedFusedMoEMethod": frozenset({"w13_weight", "w2_weight", "w13_bias", "w2_bias"}),
    "Fp8MoEMethod": frozenset(
        {
            "w13_weight",
            "w2_weight",
            "w13_bias",
            "w2_bias",
            "w13_weight_scale_inv",
            "w2_weight_scale_inv",
        }
    ),
}
"""`[num_experts, ...]` parameters by quantisation method (vLLM's class name)."""

REPLICATED = frozenset({"e_score_correction_bias", "hash_indices_table"})
"""Parameters that describe the router; every rank loads them whole."""


def declared_names(layer: Any) -> frozenset[str]:
    """Names of the per-expert parameters that the layer's quantisation method may have.

    Raises:
        DwdpUnsupportedError: the method is not declared, or its kernels cannot be rebuilt.
    """
    method = layer.quant_method
    declared = PER_EXPERT.get(type(method).__name__)
    if declared is None or not method.supports_pre_processed_weights:
        raise DwdpUnsupportedError(
            f"{layer.layer_name}: the quantisation method {type(method).__name__} is not declared "
            f"for expert sharing; declared are {', '.join(sorted(PER_EXPERT))}. Serve this "
            'checkpoint with dwdp mode "replica", or declare the method in '
            "vllm_dwdp/model_executor/expert_parameters.py."
        )
    return declared


def per_expert_parameters(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the `[num_resident_experts, ...]` parameters of a layer, contiguous along dim 0.

    Raises:
        DwdpUnsupportedError: the method or one of its parameters is not declared.
    """
    declared = declared_names(layer)
    for name, parameter in layer.named_parameters(recurse=False):
        if name in REPLICATED:
            continue
        if name not in declared:
            raise DwdpUnsupportedError(
                f"{layer.layer_name}: parameter {name!r} {tuple(parameter.shape)} of "
                f"{type(layer.quant_method).__name__} is not declared as per expert or replicated, so "
                'it could be shared wrongly. Use dwdp mode "replica", or declare it in '
                "vllm_dwdp/model_executor/expert_parameters.py."
            )
        yield name, _checked(layer, name, parameter.data)


def _checked(layer: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, if a composite tensor can stand for it."""
    if tensor.shape[0] != layer.local_num_experts or not tensor.is_contiguous():
        raise DwdpUnsupportedError(
            f"{layer.layer_name}: parameter {name!r} has shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()}; sharing needs [{layer.local_num_experts}, ...], contiguous. Use "
            'dwdp mode "replica" for this checkpoint.'
        )
    return tensor

"""Faults planted into the processing of a layer, each of which a start must find out.

Every function stands in the place of `vllm_dwdp.compat.worker.moe:complete`.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

_kept: list[torch.Tensor] = []


def _stock(layer: Any, stock: Callable[[Any], None]) -> None:
    stock(layer)
    layer._ensure_moe_quant_config_init()


def reduces_over_experts(layer: Any, stock: Callable[[Any], None]) -> None:
    """Plant a scale that is a maximum over the experts of a large tensor, as if each had it."""
    largest = layer.w13_weight.data.float().abs().amax()
    _stock(layer, stock)
    layer.quant_method.w13_maximum = largest.expand(layer.global_num_experts).clone()


def keeps_memory(layer: Any, stock: Callable[[Any], None]) -> None:
    """Plant a kernel library that keeps an alias of a processed weight where no walk finds it."""
    _stock(layer, stock)
    _kept.append(layer.w2_weight.data)


def differs_by_rank(layer: Any, stock: Callable[[Any], None]) -> None:
    """One rank has another value of a scale that all ranks must share."""
    _stock(layer, stock)
    layer.quant_method.a13_scale = torch.tensor(1.0 + int(os.environ["VLLM_DP_RANK"]))


def other_kernel(layer: Any, stock: Callable[[Any], None]) -> None:
    """One rank chose another kernel."""
    _stock(layer, stock)
    if os.environ["VLLM_DP_RANK"] == "1":
        kernel = layer.quant_method.moe_kernel.fused_experts
        kernel.__class__ = type("OtherExperts", (type(kernel),), {})


def loses_a_drafters_expert(layer: Any, stock: Callable[[Any], None]) -> None:
    """Let the last expert of a drafter's layer, behind three of the target, add nothing."""
    if ".layers.3." in layer.layer_name:
        layer.w2_weight.data[-1].zero_()
    _stock(layer, stock)

"""Faults of vLLM's own, on every device, that keep a model from being served."""

from collections.abc import Iterable
from typing import Any

import torch


def the_names_of_experts() -> None:
    """Load DBRX' experts into the module that holds them since vLLM 0.24.

    The model's loader still looks for them one module higher: issue 49004 of vLLM.
    """
    from vllm.model_executor.models import dbrx

    model: Any = dbrx.DbrxModel
    stock = model.load_weights

    def load_weights(self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        renamed = (
            (name.replace("experts.mlp.", "experts.routed_experts.mlp."), weight)
            for name, weight in weights
        )
        found: set[str] = stock(self, renamed)
        return found

    model.load_weights = load_weights

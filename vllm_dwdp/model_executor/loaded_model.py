"""Whether every layer with experts of a loaded model is one that can be shared."""

from collections.abc import Sequence

import torch

from vllm_dwdp.compat.worker import moe
from vllm_dwdp.errors import DwdpUnsupportedError
from vllm_dwdp.model_executor.routed_experts import DwdpRoutedExperts
from vllm_dwdp.model_executor.sharded_layer import ShardedLayer


def check_layers(model: torch.nn.Module, layers: Sequence[ShardedLayer]) -> None:
    """Refuse a model of which some experts are not in the shard.

    Args:
        layers: that were built for it.

    Raises:
        DwdpUnsupportedError: a layer was not replaced, or not processed, or there is none.
    """
    foreign = moe.find_foreign_layers(model, DwdpRoutedExperts)
    if foreign:
        raise DwdpUnsupportedError(
            f"{type(model).__name__} builds its experts from {', '.join(foreign)}, whose weight "
            'loading DWDP does not know, so they cannot be sharded. Use dwdp mode "replica".'
        )
    if not layers:
        raise DwdpUnsupportedError(
            f"{type(model).__name__} has built no layer with routed experts, though its config "
            "counts experts, so there is nothing to share: leave --distributed-executor-backend dwdp "
            "out."
        )
    unpublished = [entry.layer.layer_name for entry in layers if not entry.weights]
    if unpublished:
        raise DwdpUnsupportedError(
            f"{unpublished[0]}: vLLM never processed this layer's weights after loading, or left no "
            'tensor of one row per expert, so they cannot be shared. Use dwdp mode "replica".'
        )

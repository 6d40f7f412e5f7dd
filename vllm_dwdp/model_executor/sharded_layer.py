"""What a rank knows of one MoE layer whose experts it shares. Values only."""

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_dwdp.device.base import Mapping
from vllm_dwdp.layout.composite import WeightLayout
from vllm_dwdp.layout.placement import Placement
from vllm_dwdp.model_executor.expert_tensors import ExpertRows, TensorOverRows


@dataclass(frozen=True, kw_only=True)
class ShardedWeight:
    """One composite tensor of a layer, and the layer's tensors that lie over it.

    Args:
        layout: its bytes over the group.
        tensors: which are moved over the memory of a view.
        mapping: its writable pages in our shard.
    """

    layout: WeightLayout
    tensors: tuple[TensorOverRows, ...]
    mapping: Mapping


@dataclass(kw_only=True)
class ShardedLayer:
    """One MoE layer of this rank.

    Args:
        layer: vLLM's layer.
        placement: of its experts.
        model_number: of the model that it belongs to; a drafter's layers run in an order of their own.
        run_index: its place in the order in which layers were built, and run.
        weights: its composite tensors, in the order of the shard.
        private: small per-expert tensors, which every rank has whole.
        replicated: other tensors of the layer, by path.
        facts: what every rank's layer must have in common, by path.
    """

    layer: Any
    placement: Placement
    model_number: int
    run_index: int
    weights: list[ShardedWeight] = field(default_factory=list)
    private: list[ExpertRows] = field(default_factory=list)
    replicated: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    facts: dict[str, str] = field(default_factory=dict)

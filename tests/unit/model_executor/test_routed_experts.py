"""The layer replacement while a model loads: what takes memory, and when."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_dwdp.layout.placement import Placement
from vllm_dwdp.model_executor.routed_experts import shard_layer_class


class Method:
    """Of quantisation; notes how much memory the layer has while it is processed."""

    seen_bytes = -1

    def process_weights_after_loading(self, layer: Any) -> None:
        self.seen_bytes = layer.w13_weight.untyped_storage().nbytes()


class Stock(torch.nn.Module):
    """What the replacement needs of vLLM's `RoutedExperts`."""

    def __init__(
        self, name: str, dtype: torch.dtype, config: Any, quant_config: Any, maps: Any
    ) -> None:
        super().__init__()
        self.layer_name = name
        self.quant_method = Method()
        experts = torch.zeros(config.num_local_experts, 3, 5, dtype=dtype)
        self.w13_weight = torch.nn.Parameter(experts, requires_grad=False)
        self.e_score_correction_bias = torch.nn.Parameter(torch.ones(config.num_experts))

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        param.data[expert_id].copy_(loaded_weight)
        return True if return_success else None


class Registry:
    dwdp_rank = 1

    def __init__(self, *, is_adopted: bool) -> None:
        self.is_adopted = is_adopted
        self.published: list[Any] = []

    def placement(self, num_experts: int) -> Placement:
        return Placement(num_experts=num_experts, group_size=2)

    def add_layer(self, layer: Any, placement: Placement) -> None:
        pass

    def publish_layer(self, layer: Any) -> None:
        self.published.append(layer)


def make_layer(registry: Registry) -> Any:
    config = SimpleNamespace(num_experts=5, num_local_experts=5)
    layer_class = shard_layer_class(Stock, registry)
    return layer_class("experts", torch.bfloat16, config, None, SimpleNamespace())


@pytest.mark.parametrize("is_adopted", [False, True])
def test_adopted_experts_take_memory_only_while_they_are_processed(is_adopted: bool) -> None:
    """Else a rank that returns would need its experts twice, which a GPU has no room for."""
    registry = Registry(is_adopted=is_adopted)
    layer = make_layer(registry)
    resident_bytes = 2 * 3 * 5 * 2  # two of the five experts, bf16
    assert layer.w13_weight.shape == (2, 3, 5)
    held_bytes = layer.w13_weight.untyped_storage().nbytes()
    assert held_bytes == (0 if is_adopted else resident_bytes)
    assert layer.e_score_correction_bias.sum() == 5, "the router's parameters are every rank's"
    weight = torch.ones(3, 5)
    assert layer.weight_loader(layer.w13_weight, weight, "w13", "w1", 1, return_success=True)
    assert layer.weight_loader(layer.w13_weight, weight, "w13", "w1", 0) is None
    method = layer.quant_method
    method.process_weights_after_loading(layer)
    assert method.seen_bytes == resident_bytes
    assert registry.published == [layer]
    if not is_adopted:
        assert (layer.w13_weight == 1).all()

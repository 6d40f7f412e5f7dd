"""vLLM's fused-MoE layer: how its experts are cut to a shard and made whole again.

Private names used: `ExpertMapManager._local_num_experts` and `._expert_map`,
`FusedMoEConfig.num_local_experts`, `RoutedExperts.update_expert_map_info`, the layer registry
`op_registry_oot`, `weights_already_processed`, `DefaultModelLoader._init_ep_weight_filter`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_dwdp.placement import ExpertRange


def wrappable_classes() -> tuple[type, ...]:
    """Routed-experts classes whose weight loaders honour the expert map, so that they can shard."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts
    from vllm.model_executor.models.transformers.moe import TransformersRoutedExperts

    return (RoutedExperts, GptOssRoutedExperts, TransformersRoutedExperts)


@contextmanager
def replaced_layers(make_replacement: Callable[[type], type]) -> Iterator[None]:
    """While active, every routed-experts layer is built from `make_replacement(its class)`."""
    from vllm.model_executor.custom_op import op_registry_oot

    added = []
    try:
        for stock in wrappable_classes():
            name = stock.__name__
            assert name not in op_registry_oot, f"another plugin replaces {name}"
            op_registry_oot[name] = make_replacement(stock)
            added.append(name)
        yield
    finally:
        for name in added:
            del op_registry_oot[name]


def find_foreign_layers(model: torch.nn.Module, replacement: type) -> list[str]:
    """Names of routed-experts classes in `model` that the replacement did not reach."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return sorted(
        {
            type(module).__name__
            for module in model.modules()
            if isinstance(module, RoutedExperts) and not isinstance(module, replacement)
        }
    )


def keep_resident_experts(expert_map_manager: Any, moe_config: Any, resident: ExpertRange) -> None:
    """Before a layer is built: it allocates, loads and processes only `resident`."""
    expert_map = torch.full((moe_config.num_experts,), -1, dtype=torch.int32)
    expert_map[resident.start : resident.stop] = torch.arange(len(resident), dtype=torch.int32)
    expert_map_manager._local_num_experts = len(resident)
    expert_map_manager._expert_map = expert_map
    moe_config.num_local_experts = len(resident)


def make_experts_whole(layer: Any, process: Callable[[Any], None]) -> None:
    """After all experts are addressable: drop the map and rebuild the kernel over all of them.

    Args:
        layer: the routed-experts layer, its parameters already whole.
        process: the quantisation method's own `process_weights_after_loading`.
    """
    from vllm.model_executor.utils import weights_already_processed

    layer.expert_map_manager._local_num_experts = layer.global_num_experts
    layer.expert_map_manager._expert_map = None
    layer.moe_config.num_local_experts = layer.global_num_experts
    layer.update_expert_map_info()
    with weights_already_processed():
        process(layer)


@contextmanager
def resident_weight_filter(resident_expert_ids: Callable[[], set[int]]) -> Iterator[None]:
    """While active, the checkpoint reader skips experts that no layer here keeps.

    Args:
        resident_expert_ids: asked once the layers exist, before the first weight is read.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    stock = DefaultModelLoader._init_ep_weight_filter

    def init_filter(self: Any, model_config: Any) -> None:
        self.local_expert_ids = resident_expert_ids() or None

    DefaultModelLoader._init_ep_weight_filter = init_filter  # type: ignore[method-assign]
    try:
        yield
    finally:
        DefaultModelLoader._init_ep_weight_filter = stock  # type: ignore[method-assign]

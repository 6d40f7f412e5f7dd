"""vLLM's fused-MoE layer: how its experts are cut to a shard and made whole again.

Private names used: `ExpertMapManager._local_num_experts` and `._expert_map`,
`FusedMoEConfig.num_local_experts`, `RoutedExperts.update_expert_map_info`, the layer registry
`op_registry_oot`, `weights_already_processed`, `DefaultModelLoader._init_ep_weight_filter` and
`.get_all_weights`, `BaseModelLoader.load_model`.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from vllm_dwdp.layout.placement import ExpertRange

NamedTensor = tuple[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ResidentExperts:
    """What the checkpoint reader must know of this rank.

    Args:
        ids: experts that at least one layer keeps and must read; none if they are in memory already.
        split_fused: whether fused tensors must reach the model expert by expert.
    """

    ids: frozenset[int]
    split_fused: bool


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


def around_processing(layer: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Surround vLLM's processing of the layer's loaded weights, until `make_experts_whole`."""
    method = layer.quant_method
    stock = method.process_weights_after_loading

    @functools.wraps(stock)
    def process_weights_after_loading(processed: Any) -> None:
        before()
        stock(processed)
        after()

    process_weights_after_loading.dwdp_stock = stock  # type: ignore[attr-defined]
    method.process_weights_after_loading = process_weights_after_loading


def make_experts_whole(layer: Any) -> None:
    """After all experts are addressable: drop the map and rebuild the kernel over all of them.

    Args:
        layer: the routed-experts layer, its parameters already whole.
    """
    from vllm.model_executor.utils import weights_already_processed

    method = layer.quant_method
    process = method.process_weights_after_loading
    method.process_weights_after_loading = getattr(process, "dwdp_stock", process)
    layer.expert_map_manager._local_num_experts = layer.global_num_experts
    layer.expert_map_manager._expert_map = None
    layer.moe_config.num_local_experts = layer.global_num_experts
    layer.update_expert_map_info()
    with weights_already_processed():
        method.process_weights_after_loading(layer)


def kernel_identity(layer: Any) -> tuple[str, list[str]]:
    """The quantisation method of a layer, and the backends that it chose."""
    method = layer.quant_method
    choices = [str(value) for value in vars(method).values() if isinstance(value, Enum)]
    return type(method).__name__, choices


@dataclass(frozen=True)
class KernelState:
    """What a layer's quantisation method holds: its kernel, and what that captured."""

    state: dict[str, Any]

    @classmethod
    def of(cls, layer: Any) -> "KernelState":
        """The present one."""
        return cls(dict(vars(layer.quant_method)))

    def restore(self, layer: Any) -> None:
        """Put it back in place."""
        vars(layer.quant_method).update(self.state)


@contextmanager
def resident_weights(resident_experts: Callable[[], ResidentExperts]) -> Iterator[None]:
    """While active, the checkpoint reader skips experts that no layer here keeps.

    Args:
        resident_experts: asked once the layers exist, before the first weight is read.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    stock_filter = DefaultModelLoader._init_ep_weight_filter
    stock_weights = DefaultModelLoader.get_all_weights

    def init_filter(self: Any, model_config: Any) -> None:
        self.dwdp_resident = resident_experts()
        # vLLM takes an empty set for "all of them"; no expert is numbered -1.
        self.local_expert_ids = self.dwdp_resident.ids or {-1}

    def get_all_weights(self: Any, *args: Any, **kwargs: Any) -> Iterator[NamedTensor]:
        weights = stock_weights(self, *args, **kwargs)
        resident = self.dwdp_resident
        return _split_fused(weights, resident) if resident.split_fused else weights

    DefaultModelLoader._init_ep_weight_filter = init_filter
    DefaultModelLoader.get_all_weights = get_all_weights
    try:
        yield
    finally:
        DefaultModelLoader._init_ep_weight_filter = stock_filter
        DefaultModelLoader.get_all_weights = stock_weights


@contextmanager
def numbered_models() -> Iterator[Callable[[], int]]:
    """While active, tells which model is being built: 0 for the first, then 1 for its drafter, ...

    A drafter's config may be the target's own (MTP, EAGLE), so nothing else tells their layers apart.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    stock = BaseModelLoader.load_model
    number = -1

    @functools.wraps(stock)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += 1
        return stock(self, *args, **kwargs)

    BaseModelLoader.load_model = load_model
    try:
        yield lambda: number
    finally:
        BaseModelLoader.load_model = stock


def loads_fused_tensors_whole(layer: Any) -> bool:
    """Whether the layer's model copies a fused `[num_experts, ...]` tensor without the expert map.

    gpt-oss does, but it also takes experts one by one, named `experts.<id>.<parameter>`.
    """
    from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

    return isinstance(layer, GptOssRoutedExperts)


def _split_fused(
    weights: Iterator[NamedTensor], resident: ResidentExperts
) -> Iterator[NamedTensor]:
    """Replace each fused expert tensor by its resident experts; the others are never read."""
    for name, tensor in weights:
        prefix, separator, parameter = name.partition(".experts.")
        if not separator or parameter.split(".")[0].isdigit():
            yield name, tensor
            continue
        for expert in sorted(resident.ids):
            if expert < tensor.shape[0]:
                yield f"{prefix}.experts.{expert}.{parameter}", tensor[expert]

"""vLLM's fused-MoE layer: how it is built, loaded and processed, and where we come in.

Private names used: the layer registry `op_registry_oot`, `RoutedExperts._ensure_moe_quant_config_init`,
`OnlineMoEMethodBase`.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch

from vllm_dwdp.errors import DwdpUnsupportedError


def wrappable_classes() -> tuple[type, ...]:
    """Routed-experts classes that load through `weight_loader`, so that they can shard."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.models.dbrx import DbrxExperts
    from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts
    from vllm.model_executor.models.transformers.moe import TransformersRoutedExperts

    return (RoutedExperts, DbrxExperts, GptOssRoutedExperts, TransformersRoutedExperts)


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


def stock_twin(
    stock: type, moe_config: Any, build: Callable[[type, Any], Any]
) -> Callable[..., Any]:
    """How to build a stock layer with the config that a layer is about to be built with.

    What is returned takes mixins, which go before vLLM's class.

    Args:
        stock: vLLM's class.
        moe_config: which building changes.
        build: makes a layer of a class with a config.
    """
    kept = copy.copy(moe_config)
    name = f"{stock.__name__}Twin"  # the registry replaces classes by name
    return lambda *mixins: build(type(name, (*mixins, stock), {}), copy.copy(kept))


def give_later_tensors(twin: Any, layer: Any) -> None:
    """Give a twin the tensors that the layer's model has put on it since it was built.

    As DeepSeek-V4 puts its table of the experts of each token there.
    """
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor) and not hasattr(twin, name):
            object.__setattr__(twin, name, value)


def around_processing(layer: Any, process: Callable[[Callable[[], None]], None]) -> None:
    """Call `process` in place of vLLM's processing of the layer's loaded weights, with that."""
    method = layer.quant_method
    stock = method.process_weights_after_loading

    def process_weights_after_loading(processed: Any) -> None:
        del method.process_weights_after_loading  # stock again
        process(lambda: complete(layer, stock))

    method.process_weights_after_loading = process_weights_after_loading


def process(layer: Any) -> None:
    """Process a stock layer as vLLM does after loading."""
    complete(layer, layer.quant_method.process_weights_after_loading)


def complete(layer: Any, stock: Callable[[Any], None]) -> None:
    stock(layer)
    layer._ensure_moe_quant_config_init()  # else a first forward would make tensors that are not moved


def num_slices(moe_config: Any) -> int:
    """Into how many slices tensor parallelism cuts the experts of a layer with this config."""
    return int(moe_config.moe_parallel_config.tp_size)


def kernel_identity(layer: Any) -> str:
    """Return the quantisation method of a layer, and the kernel that it chose."""
    method = layer.quant_method
    choices = [str(value) for value in vars(method).values() if isinstance(value, Enum)]
    kernel = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    names = [type(method).__name__, *choices]
    return ", ".join(names if kernel is None else [*names, type(kernel).__name__])


def check_method(layer: Any) -> None:
    """Refuse a quantisation method whose loading cannot leave experts out.

    Raises:
        DwdpUnsupportedError: with the way out; nothing is loaded yet.
    """
    from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase
    from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

    method = type(layer.quant_method).__name__
    if isinstance(layer.quant_method, OnlineMoEMethodBase):
        why = (
            "quantises bf16 experts while they are loaded, all of a layer at once. Serve a checkpoint "
            "that is quantised already, leave --quantization out,"
        )
    elif isinstance(layer, GptOssRoutedExperts) and method.startswith("Quark"):
        why = (
            "is loaded past the layer's weight loader, expert by expert, in gpt-oss. Serve the MXFP4 "
            "checkpoint as published,"
        )
    elif "NvFp4MoeBackend.MARLIN" in kernel_identity(layer):
        why = (
            "gives the scales of an expert a factor that depends on all of them, on Marlin. Choose "
            "another --moe-backend,"
        )
    else:
        return
    raise DwdpUnsupportedError(
        f"{layer.layer_name}: a rank cannot load its share only: {method} {why} or use dwdp mode "
        '"replica".'
    )


def copies_fused_tensors(layer: Any) -> bool:
    """Whether the layer's model copies a fused `[num_experts, ...]` tensor past the weight loader.

    gpt-oss does where it is not quantised; it also takes experts one by one, named
    `experts.<id>.<parameter>`.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

    return isinstance(layer, GptOssRoutedExperts) and isinstance(
        layer.quant_method, UnquantizedFusedMoEMethod
    )

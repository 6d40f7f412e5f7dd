"""vLLM's reloading of weights in place: what it leaves to us, and what it must not touch.

vLLM puts each module back to the form in which it was built, loads and processes it, and copies the
result into the tensors that serve. Expert layers are ours: a new layer stands in the tree instead of the
serving one while weights come, and takes them.

Private names used: `reload.layerwise.get_layerwise_info`, `LayerReloadingInfo.load_numel_total`,
`.kernel_tensors`, `_place_kernel_tensors`, `EngineCore.resume_scheduler`.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from vllm_dwdp.errors import DwdpUnsupportedError

NamedTensor = tuple[str, torch.Tensor]


def check_loader(vllm_config: Any) -> None:
    """Check that vLLM can reload in the load format of this rank.

    Raises:
        DwdpUnsupportedError: it cannot.
    """
    from vllm.model_executor.model_loader import get_model_loader

    if not hasattr(get_model_loader(vllm_config.load_config), "get_all_weights"):
        raise DwdpUnsupportedError(
            f"vLLM cannot reload weights with --load-format {vllm_config.load_config.load_format}"
        )


def download(vllm_config: Any, model: Any, path: str | None) -> None:
    """Get the weights of a name on a hub, as a reload from `path` would; None is for the last name."""
    from vllm.model_executor.model_loader import get_model_loader

    if getattr(model, "allow_patterns_overrides", None) is not None:
        return  # only a reload itself knows which files it wants
    config = copy.copy(vllm_config.model_config)
    if path is not None:
        config.model, config.model_weights, config.revision = path, "", None
    get_model_loader(vllm_config.load_config).download_model(config)


@contextmanager
def building(vllm_config: Any, device: torch.device) -> Iterator[None]:
    """While active, layers can be built as when the model was loaded."""
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    with (
        set_current_vllm_config(vllm_config),
        set_default_torch_dtype(vllm_config.model_config.dtype),
        device,
    ):
        yield


def exchange(model: torch.nn.Module, others: Mapping[torch.nn.Module, torch.nn.Module]) -> None:
    """Put other modules in the places of those that are keys."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in others:
                parent._modules[name] = others[child]


def plain_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules with tensors that are served as they are loaded: norms, attention sinks.

    vLLM's reload has them on no device meanwhile, so that what a model copies into them past their
    loaders, as gpt-oss does its sinks, is lost. Loaded in place it is not.
    """
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    return [
        module
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
        and not isinstance(getattr(module, "quant_method", None), QuantizeMethodBase)
        and not is_deferred_attention_layer(module)
    ]


def hide(layer: torch.nn.Module) -> None:
    """vLLM's reload, when it begins, takes this layer for one that it has begun, and leaves it alone."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    get_layerwise_info(layer).load_numel_total = 0


def show(layer: torch.nn.Module) -> None:
    """Let a reload that has begun take a hidden layer for one that it has finished when it ends."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    get_layerwise_info(layer).reset()


def abandon(model: torch.nn.Module) -> None:
    """End a reload that failed: every module has the tensors again that it served with."""
    from vllm.model_executor.model_loader.reload import layerwise

    for module in model.modules():
        info = layerwise.get_layerwise_info(module)
        if info.can_load() and info.kernel_tensors is not None:
            layerwise._place_kernel_tensors(module, info)
        info.reset()


@contextmanager
def watched_loading(
    model: Any, begin: Callable[[], None], watch: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """While active, `watch` sees every tensor of a checkpoint that the model is given.

    Args:
        begin: called before the model is given some.
    """
    stock = model.load_weights

    def load_weights(weights: Iterable[NamedTensor], *args: Any, **kwargs: Any) -> Any:
        begin()
        return stock(_seen(weights, watch), *args, **kwargs)

    model.load_weights = load_weights
    try:
        yield
    finally:
        del model.load_weights


def _seen(
    weights: Iterable[NamedTensor], watch: Callable[[str, torch.Tensor], None]
) -> Iterator[NamedTensor]:
    for name, tensor in weights:
        watch(name, tensor)
        yield name, tensor


def check_before_resuming() -> None:
    """From now on, an engine of this process asks its workers before it goes on after a pause."""
    from vllm.v1.engine.core import EngineCore

    stock: Any = EngineCore.resume_scheduler
    if hasattr(stock, "dwdp_stock"):
        return

    @functools.wraps(stock)
    def resume_scheduler(self: Any) -> None:
        if hasattr(self.model_executor, "check_weights"):
            self.model_executor.check_weights()
        stock(self)

    resume_scheduler.dwdp_stock = stock  # type: ignore[attr-defined]
    EngineCore.resume_scheduler = resume_scheduler

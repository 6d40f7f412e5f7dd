"""The fused-MoE layer replacement: a routed-experts layer that keeps, of what is large, its share.

While a model is loaded, vLLM builds `shard_layer_class(RoutedExperts)` in place of `RoutedExperts`, for
all experts, as it always does. The layer loads what this rank keeps, is processed by vLLM as a whole,
and reports to the `ShardRegistry` of the rank. Once the group has met, its tensors are moved over memory
in which all experts are. Runs in the worker's main thread.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vllm_dwdp.compat.worker import moe
from vllm_dwdp.device.base import Device
from vllm_dwdp.layout.placement import ExpertRange
from vllm_dwdp.model_executor import ops
from vllm_dwdp.model_executor.processed_layer import ProcessedLayer
from vllm_dwdp.model_executor.raw_parameters import LoadsRawParameters, RawParameters
from vllm_dwdp.model_executor.twin import LayerTwin, check_same


class ShardRegistry(Protocol):
    """Where layers announce themselves while a model is loaded."""

    @property
    def device(self) -> Device:
        """That holds the experts."""

    def loads(self, num_experts: int) -> ExpertRange:
        """Return the experts of a layer with that many that this rank reads from the checkpoint."""

    def needs_proof(self, layer: "DwdpRoutedExperts") -> bool:
        """Whether no layer of this kind has been proved yet."""

    def add_layer(self, layer: "DwdpRoutedExperts") -> None:
        """Note that the layer exists; nothing of it is loaded."""

    def publish_layer(self, layer: "DwdpRoutedExperts", processed: ProcessedLayer) -> None:
        """Note that the layer is in its runtime format."""


@dataclass(frozen=True)
class RingPosition:
    """Which prefetch ring of this worker a layer belongs to, and its index in it."""

    ring: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Binding:
    """A layer over one view of all its experts: what `use` puts in place.

    Args:
        tensors: each tensor of the layer, and what it is over the memory of the view.
        ring_position: where the layer waits and records; None for a view that needs no copies.
    """

    tensors: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    ring_position: RingPosition | None


class DwdpRoutedExperts(LoadsRawParameters):
    """Mixin over a vLLM routed-experts class; see the module docstring."""

    dwdp_registry: ShardRegistry
    dwdp_stock: type
    ring_position: RingPosition | None = None
    layer_name: str
    make_twin: Callable[..., Any]
    """Builds a stock layer with the same arguments, of a class with these mixins."""

    def __init__(
        self,
        layer_name: str,
        params_dtype: torch.dtype,
        moe_config: Any,
        quant_config: Any,
        expert_map_manager: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        registry = self.dwdp_registry

        def build(cls: type, config: Any) -> Any:
            given = (layer_name, params_dtype, config, quant_config, expert_map_manager)
            return cls(*given, *args, **kwargs)

        self.make_twin = moe.stock_twin(self.dwdp_stock, moe_config, build)
        super().__init__(  # type: ignore[call-arg]
            layer_name, params_dtype, moe_config, quant_config, expert_map_manager, *args, **kwargs
        )
        moe.check_method(self)
        num_experts = moe_config.num_experts
        self.raw = RawParameters(
            self, num_experts, registry.loads(num_experts), moe.num_slices(moe_config)
        )
        self._twin: tuple[LayerTwin, ...] = ()  # in a tuple torch registers no module
        if registry.needs_proof(self):
            self._twin = (LayerTwin(self.make_twin(), self),)
        moe.around_processing(self, self._process)
        registry.add_layer(self)

    def kind(self) -> str:
        """Return what layers have in common that are processed alike."""
        parameters = [(name, each.shape, each.dtype) for name, each in self.raw.parameters()]
        return f"{moe.kernel_identity(self)} {parameters}"

    def _process(self, stock: Callable[[], None]) -> None:
        """Process one layer as stock vLLM does, whole, and hand its experts over.

        Layer by layer, so that a start never holds more than one of them whole.
        """
        registry, device = self.dwdp_registry, self.dwdp_registry.device.torch_device
        self.raw.check_complete(self.layer_name)
        found = [twin.process(self.raw, device) for twin in self._twin]
        self._twin = ()
        registry.device.release_free_memory()
        watched = self.raw.make_whole()
        stock()
        processed = ProcessedLayer(self, device, watched)
        while found:
            check_same(
                self.layer_name, found.pop(), processed.independent_of_others(self.raw.resident)
            )
        registry.publish_layer(self, processed)

    def use(self, binding: Binding) -> None:
        """Serve from `binding` from now on; the memory behind it must outlive the layer."""
        for tensor, placed in binding.tensors:
            tensor.data = placed
        # Not by torch's own, which looks for parameters and takes as long as all tensors of a layer.
        object.__setattr__(self, "ring_position", binding.ring_position)

    def forward_modular(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """vLLM's `RoutedExperts.forward_modular`, after the slot holds this layer."""
        return self._in_ring(super().forward_modular, x, *args, **kwargs)  # type: ignore[misc]

    def forward_monolithic(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """vLLM's `RoutedExperts.forward_monolithic`, after the slot holds this layer."""
        return self._in_ring(super().forward_monolithic, x, *args, **kwargs)  # type: ignore[misc]

    def _in_ring(
        self, forward: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the layer's kernels between the wait and the record of its slot, if it has one."""
        if self.ring_position is None:
            return forward(x, *args, **kwargs)
        ring, index = self.ring_position.ring, self.ring_position.index
        ops.wait_layer(x, ring, index)
        output = forward(x, *args, **kwargs)
        ops.record_layer(output if isinstance(output, torch.Tensor) else x, ring, index)
        return output


@functools.cache
def _replacement_name(stock: type) -> str:
    return f"Dwdp{stock.__name__}"


def shard_layer_class(stock: type, registry: ShardRegistry) -> type:
    """Return the class that vLLM builds in place of `stock` while `registry`'s rank loads a model."""
    own = {"dwdp_registry": registry, "dwdp_stock": stock}
    return type(_replacement_name(stock), (DwdpRoutedExperts, stock), own)

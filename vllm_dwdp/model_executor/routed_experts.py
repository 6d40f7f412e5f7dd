"""The fused-MoE layer replacement: a routed-experts layer that allocates and loads its shard only.

While a model is loaded, vLLM builds `shard_layer_class(RoutedExperts)` in place of `RoutedExperts`.
The layer keeps the resident experts, reports its processed weights to the `ShardRegistry` of the
rank, and is given composite tensors once the group has met. Runs in the worker's main thread.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vllm_dwdp.compat.worker import moe
from vllm_dwdp.layout.placement import Placement
from vllm_dwdp.model_executor import ops
from vllm_dwdp.model_executor.expert_parameters import REPLICATED


class ShardRegistry(Protocol):
    """Where layers announce themselves while a model is loaded."""

    def placement(self, num_experts: int) -> Placement:
        """Placement of a layer with that many experts."""

    @property
    def dwdp_rank(self) -> int:
        """This rank's position in its group."""

    @property
    def is_adopted(self) -> bool:
        """Whether the experts are in memory already, and nothing of them is loaded."""

    def add_layer(self, layer: "DwdpRoutedExperts", placement: Placement) -> None:
        """The layer exists; nothing of it is loaded."""

    def publish_layer(self, layer: "DwdpRoutedExperts") -> None:
        """The layer's resident experts are in their runtime format."""


@dataclass(frozen=True)
class RingPosition:
    """Which prefetch ring of this worker a layer belongs to, and its index in it."""

    ring: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Binding:
    """A layer bound to one view of all its experts: what `use` puts in place.

    Args:
        parameters: by name, over composite memory.
        kernel: the kernel that captured these parameters.
        ring_position: where the layer waits and records; None for a view that needs no copies.
    """

    parameters: dict[str, torch.nn.Parameter]
    kernel: moe.KernelState
    ring_position: RingPosition | None


class DwdpRoutedExperts:
    """Mixin over a vLLM routed-experts class; see the module docstring."""

    dwdp_registry: ShardRegistry
    ring_position: RingPosition | None = None

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
        placement = registry.placement(moe_config.num_experts)
        resident = placement.resident[registry.dwdp_rank]
        moe.keep_resident_experts(expert_map_manager, moe_config, resident)
        super().__init__(  # type: ignore[call-arg]
            layer_name,
            params_dtype,
            moe_config,
            quant_config,
            expert_map_manager,
            *args,
            **kwargs,
        )
        # Per layer, so that the start never holds more than one layer twice: a layer whose experts
        # are adopted takes memory of its own only while vLLM processes it.
        moe.around_processing(self, self._take_storage, lambda: registry.publish_layer(self))
        self._storage_bytes: dict[str, int] = {}
        if registry.is_adopted:
            self._give_up_storage()
        registry.add_layer(self, placement)

    def _give_up_storage(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):  # type: ignore[attr-defined]
            if name not in REPLICATED:
                self._storage_bytes[name] = parameter.untyped_storage().nbytes()
                parameter.untyped_storage().resize_(0)

    def _take_storage(self) -> None:
        """Whatever it held is lost."""
        for name, num_bytes in self._storage_bytes.items():
            getattr(self, name).untyped_storage().resize_(num_bytes)

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> Any:
        """vLLM's, for experts that are loaded; adopted ones have no memory to load into."""
        if self._storage_bytes:
            return True if return_success else None
        return super().weight_loader(  # type: ignore[misc]
            param, loaded_weight, weight_name, shard_id, expert_id, return_success
        )

    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]

    def bind(
        self, tensors: dict[str, torch.Tensor], ring_position: RingPosition | None = None
    ) -> Binding:
        """Serve all experts from whole `[num_experts, ...]` tensors; may be called for each view.

        Args:
            tensors: by parameter name; the memory behind them must outlive the layer.
            ring_position: of the layer, if the tensors lie in a prefetch slot.
        """
        parameters = {
            name: torch.nn.Parameter(tensor, requires_grad=False)
            for name, tensor in tensors.items()
        }
        for name, parameter in parameters.items():
            setattr(self, name, parameter)
        moe.make_experts_whole(self)
        self.ring_position = ring_position
        return Binding(
            parameters=parameters, kernel=moe.KernelState.of(self), ring_position=ring_position
        )

    def use(self, binding: Binding) -> None:
        """Serve from `binding`, made by `bind`, from now on."""
        for name, parameter in binding.parameters.items():
            setattr(self, name, parameter)
        binding.kernel.restore(self)
        self.ring_position = binding.ring_position

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
    """The class that vLLM builds in place of `stock` while `registry`'s rank loads a model."""
    return type(_replacement_name(stock), (DwdpRoutedExperts, stock), {"dwdp_registry": registry})

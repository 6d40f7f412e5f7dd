"""A layer's parameters as they come from the checkpoint: large ones keep resident experts only.

vLLM builds the layer for all experts. Between that and its processing, a parameter of many bytes per
expert holds the rows of this rank's experts; the rows of others are neither stored nor read. Small ones,
scales above all, are loaded for every expert: methods reduce over them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from vllm_dwdp.errors import DwdpUnsupportedError
from vllm_dwdp.layout.placement import ExpertRange
from vllm_dwdp.model_executor.expert_tensors import LARGE_ROW_BYTES
from vllm_dwdp.model_executor.relocation import WatchedStorage


class RawParameters:
    """The loaded parameters of one layer until they are processed.

    Args:
        layer: vLLM's, built for all experts; large parameters give their memory up at once.
        num_experts: of the layer.
        resident: experts whose rows are loaded; none if they are in memory already.
        num_slices: into which tensor parallelism cuts a large tensor, of which the layer has one.
        before_loading: called before something is loaded; where given, large parameters take no memory
            sooner.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        resident: ExpertRange,
        num_slices: int = 1,
        *,
        before_loading: Callable[[], None] | None = None,
    ) -> None:
        self.num_experts = num_experts
        self.resident = resident
        self._num_slices = num_slices
        self._before_loading = before_loading
        self.read_bytes = 0
        """Bytes of large parameters that were read from the checkpoint."""
        self.checkpoint_bytes = 0
        """Bytes of large parameters that the checkpoint has, of all experts; of our slice."""
        self.small: dict[str, torch.nn.Parameter] = {}
        self.large: dict[str, torch.nn.Parameter] = {}
        self._loaded: dict[tuple[str, str], set[int]] = {}
        for name, parameter in layer.named_parameters(recurse=False):
            kind = self.large if self._is_large(parameter) else self.small
            kind[name] = parameter
        self._names = {id(each): name for name, each in (self.large | self.small).items()}
        self.whole_bytes: int = sum(parameter.nbytes for parameter in self.large.values())
        """Bytes of large parameters of all experts, which they take while they are processed."""
        for parameter in self.large.values():
            parameter.data = parameter.data.new_empty(0, *parameter.shape[1:])
        if before_loading is None:
            self.take_room()

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """All parameters that are not processed yet, by name."""
        return [*self.large.items(), *self.small.items()]

    def _is_large(self, parameter: torch.nn.Parameter) -> bool:
        counts_experts = parameter.dim() > 0 and parameter.shape[0] == self.num_experts
        return bool(counts_experts) and parameter.nbytes // self.num_experts >= LARGE_ROW_BYTES

    @property
    def resident_bytes(self) -> int:
        """Bytes of large parameters that this rank keeps once they are loaded."""
        return self.whole_bytes // self.num_experts * len(self.resident)

    @property
    def loaded(self) -> dict[tuple[str, str], set[int]]:
        """Which experts were loaded, by parameter and the part of it."""
        return self._loaded

    def take_room(self) -> None:
        """Make room for the resident rows of large parameters, if there is none yet."""
        for parameter in self.large.values():
            if len(parameter) != len(self.resident):
                parameter.data = parameter.data.new_empty(len(self.resident), *parameter.shape[1:])

    def load(
        self,
        stock: Callable[..., Any],
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int | None,
        return_success: bool,
    ) -> Any:
        """Let vLLM's `stock` loader load what this rank keeps of `loaded_weight`.

        Args:
            loaded_weight: of expert `expert_id`, or of all, along its first dimension.
        """
        if self._before_loading is not None:
            self._before_loading()
        self.take_room()
        name = self._names.get(id(param), weight_name)
        is_whole = expert_id is None or self._has_all_experts(param, loaded_weight)
        experts = (
            range(self.num_experts) if is_whole else range(expert_id or 0, (expert_id or 0) + 1)
        )
        # A loader of its own may name the parameter again, as DBRX': the weight's name says the part.
        part = weight_name if str(shard_id).endswith(name) else str(shard_id)
        self._loaded.setdefault((name, part), set()).update(experts)
        if name in self.large:
            self.checkpoint_bytes += loaded_weight.nbytes // self._num_slices
            if is_whole:
                loaded_weight = self._resident_part(loaded_weight)
            elif experts.start in self.resident:
                expert_id = experts.start - self.resident.start
            else:
                loaded_weight = loaded_weight[:0]
            self.read_bytes += loaded_weight.nbytes // self._num_slices
            if not loaded_weight.numel():
                return True if return_success else None
        return stock(param, loaded_weight, weight_name, shard_id, expert_id, return_success)

    def keeps(self, tensor: torch.Tensor) -> bool:
        """Whether this is a parameter of the layer that has resident rows only."""
        return self._names.get(id(tensor)) in self.large

    def fill(self, parameter: torch.Tensor, stock: Callable[[torch.Tensor], None]) -> None:
        """Let vLLM's `stock` loader of dummy weights fill a large parameter as one of all experts.

        What it writes into a row depends on the rows before it. A rank that returns has its rows in
        memory, and fills none.
        """
        if not len(self.resident):
            return
        whole = rows_of_zeros(parameter, self.num_experts)
        whole.__dict__.update(parameter.__dict__)
        stock(whole)
        rows = whole[self.resident.start : self.resident.stop]
        bytes_of(parameter.data).copy_(bytes_of(rows))

    def _has_all_experts(self, param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> bool:
        same_rank = loaded_weight.dim() == param.dim()
        return same_rank and bool(loaded_weight.shape[0] == self.num_experts)

    def _resident_part(self, fused: torch.Tensor) -> torch.Tensor:
        """Our experts of a fused tensor, whose first dimension may count rows of experts."""
        rows = fused.shape[0] // self.num_experts
        return fused[self.resident.start * rows : self.resident.stop * rows]

    def check_complete(self, layer_name: str) -> None:
        """Prove that what was loaded was loaded for every expert.

        Raises:
            DwdpUnsupportedError: a row is missing, and would be whatever its memory held.
        """
        for (name, shard), experts in self._loaded.items():
            missing = sorted(set(range(self.num_experts)) - experts)
            if missing:
                raise DwdpUnsupportedError(
                    f"{layer_name}: the checkpoint gave no {name} ({shard}) for expert {missing[0]} "
                    f"({len(missing)} of {self.num_experts} are missing). Check that the checkpoint "
                    'is complete; if stock vLLM serves it, use dwdp mode "replica".'
                )

    def make_whole(self) -> list[WatchedStorage]:
        """Give every large parameter a row for each expert, those of other ranks zero; ends the loading.

        Returns the storages; once the layer is processed they hold its own tensors, or are gone.
        """
        self.take_room()
        watched = []
        while self.large:
            name, parameter = self.large.popitem()
            whole = rows_of_zeros(parameter, self.num_experts)
            if len(self.resident):
                rows = whole[self.resident.start : self.resident.stop]
                bytes_of(rows).copy_(bytes_of(parameter.data))
            parameter.data = whole
            watched.append(WatchedStorage.of(name, whole))
        self.small.clear()
        return watched


def rows_of_zeros(parameter: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Zeros of a parameter's type, with a row for each expert; not every type can be filled."""
    shape = (num_experts, *parameter.shape[1:])
    size = math.prod(shape) * parameter.element_size()
    zeros = torch.zeros(size, dtype=torch.uint8, device=parameter.device).untyped_storage()
    strides = torch.empty(shape, device="meta").stride()
    return torch.empty(0, dtype=parameter.dtype, device=parameter.device).set_(
        zeros, 0, shape, strides
    )


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a contiguous tensor; some types of few bits cannot be copied as they are."""
    return tensor.view(-1).view(torch.uint8)


class LoadsRawParameters:
    """Mixin over a vLLM routed-experts class: loads what `raw` keeps."""

    raw: RawParameters

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int | None = None,
        return_success: bool = False,
    ) -> Any:
        """Load what this rank keeps of `loaded_weight`, as vLLM's loader does."""
        return self.raw.load(
            super().weight_loader,  # type: ignore[misc]
            param,
            loaded_weight,
            weight_name,
            shard_id,
            expert_id,
            return_success,
        )

    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]

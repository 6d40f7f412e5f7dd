"""Proves for one layer of each kind that what a rank provides does not depend on experts of others.

The rank processes its layers with zeros in place of other ranks' experts. A second layer, the twin, is
built and processed likewise, but with other values there. Resident rows, replicated tensors and numbers
must come out the same, bit for bit: a method that reduces over the experts of a large tensor, as a scale
that is a maximum over all weights, is found out before it serves. Nothing is read from the checkpoint
for this; the twin is freed before the layer itself is processed.
"""

from collections.abc import Mapping
from typing import Any

import torch

from vllm_dwdp.compat.worker import moe
from vllm_dwdp.compat.worker.reachable import reachable_tensors
from vllm_dwdp.errors import DwdpUnsupportedError
from vllm_dwdp.layout.placement import ExpertRange
from vllm_dwdp.model_executor.processed_layer import Findings, ProcessedLayer
from vllm_dwdp.model_executor.raw_parameters import RawParameters, bytes_of, rows_of_zeros
from vllm_dwdp.model_executor.relocation import detach


class LayerTwin:
    """A second layer like `layer`, and what came of processing it with other remote experts.

    Args:
        layer: built by stock vLLM for all experts, with the arguments of `original`.
        original: the layer that it stands for; what was given to both, as a router's bias, is shared.
    """

    def __init__(self, layer: Any, original: Any) -> None:
        self._layer, self._original = layer, original
        originals = {id(tensor) for tensor in reachable_tensors(original).values()}
        self._shared = originals & {id(tensor) for tensor in reachable_tensors(layer).values()}
        self._large = RawParameters(layer, layer.global_num_experts, ExpertRange(0, 0)).large

    def process(self, raw: RawParameters, device: torch.device) -> Findings:
        """Process the twin with the resident experts of `raw`; its memory is free afterwards."""
        layer = self._layer
        moe.give_later_tensors(layer, self._original)
        del self._layer, self._original
        for name, parameter in raw.small.items():
            getattr(layer, name).data.copy_(parameter.data)
        for name, parameter in raw.large.items():
            self._large.pop(name).data = disturbed(parameter, raw.num_experts, raw.resident)
        moe.process(layer)
        processed = ProcessedLayer(layer, device, ())
        found = {
            path: value.clone() if isinstance(value, torch.Tensor) else value
            for path, value in processed.independent_of_others(raw.resident).items()
        }
        for rows in (
            processed.tensors.per_expert
        ):  # reference cycles keep the layer alive, so its memory goes by hand
            detach(each for each in rows.tensors if id(each.tensor) not in self._shared)
        return found


def disturbed(
    parameter: torch.nn.Parameter, num_experts: int, resident: ExpertRange
) -> torch.Tensor:
    """Return the resident rows of a parameter among rows that are neither zero nor like them."""
    whole = rows_of_zeros(parameter, num_experts)
    for expert in range(num_experts):
        is_ours = expert in resident
        row = parameter.data[expert - resident.start if is_ours else expert % len(resident)]
        row = row if is_ours else _other_values(row)
        bytes_of(whole[expert]).copy_(bytes_of(row.contiguous()))
    return whole


def _other_values(row: torch.Tensor) -> torch.Tensor:
    """Values of about the same size that no maximum, minimum or sum takes for zeros or for the row."""
    if row.dtype.is_floating_point and row.element_size() > 1:
        return row * 2 + 1
    if row.dtype.is_floating_point and row.dtype is not torch.float8_e8m0fnu:
        limit = torch.finfo(row.dtype).max
        return (row.float() * 2 + 1).clamp(-limit, limit).to(row.dtype)
    rolled = row.view(torch.uint8).roll(1, dims=-1) if row.element_size() == 1 else row.roll(1, -1)
    return rolled ^ 1 if rolled.dtype is torch.uint8 else rolled


def check_same(layer_name: str, twin: Mapping[str, Any], layer: Mapping[str, Any]) -> None:
    """Compare the findings of a layer with those of its twin.

    Raises:
        DwdpUnsupportedError: one of them depends on what other ranks load.
    """
    for path in dict.fromkeys([*twin, *layer]):
        one, other = twin.get(path), layer.get(path)
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            same = torch.equal(one, other)
        else:
            same = repr(one) == repr(other)  # by repr: NaN is not equal to itself
        if not same:
            raise DwdpUnsupportedError(
                f"{layer_name}: what processing makes of {path} depends on experts that other ranks "
                'hold, so it would be silently wrong here. Use dwdp mode "replica" for this checkpoint.'
            )

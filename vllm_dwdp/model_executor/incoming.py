"""New weights for the expert layers of a model that serves, layer by layer into this rank's shard.

A new layer like each serving one takes its place in the module tree, and the weights that come. Once a
layer has all that it had when it was loaded first, it is processed whole, as at a start; its resident
rows are copied into the shard, its replicated tensors into those that serve, and its memory is freed.
The serving layer, its kernels and what was captured of it stay what they are. Worker's main thread,
while no forward runs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch

from vllm_dwdp.compat.worker import moe, reloading
from vllm_dwdp.compat.worker.reachable import reachable_tensors
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.errors import DwdpUnsupportedError, WeightUpdateError
from vllm_dwdp.layout.model import ModelLayout
from vllm_dwdp.model_executor.expert_shard import TIMES_WHOLE, ExpertShard
from vllm_dwdp.model_executor.expert_tensors import ExpertRows
from vllm_dwdp.model_executor.processed_layer import ProcessedLayer
from vllm_dwdp.model_executor.raw_parameters import LoadsRawParameters, RawParameters
from vllm_dwdp.model_executor.relocation import detach
from vllm_dwdp.model_executor.sharded_layer import ShardedLayer


class ModelUpdate:
    """New weights on their way into one model; `finish` or `abandon` ends it.

    Args:
        shard: of this rank; sealed.
        layout: of all experts over the group.
        model: vLLM's, whose expert layers are in the shard.
        base: address of the whole shard, writable.
        building: in which vLLM builds and processes layers.
    """

    def __init__(
        self,
        shard: ExpertShard,
        layout: ModelLayout,
        model: torch.nn.Module,
        base: int,
        building: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.facts: dict[str, dict[str, str]] = {}
        """What the layers that are written have in common on all ranks, by layer name."""
        self._shard = shard
        self._layout = layout
        self._model = model
        self._base = base
        self._building = building
        modules = set(model.modules())
        with building():
            self._places = {
                self._make_incoming(entry): (index, entry)
                for index, entry in enumerate(shard.published)
                if entry.layer in modules
            }
        self._begun: list[Any] = []
        plain = reloading.plain_layers(model)
        incoming = [module for layer in self._places for module in layer.modules()]
        self._hidden = [*plain, *incoming]
        for module in self._hidden:
            reloading.hide(module)
        with ExitStack() as undo:
            undo.callback(self._put_back)
            reloading.exchange(model, {e.layer: new for new, (_, e) in self._places.items()})
            self._resources = undo.pop_all()

    def _make_incoming(self, entry: ShardedLayer) -> Any:
        layer = entry.layer.make_twin(LoadsRawParameters)
        moe.give_later_tensors(layer, entry.layer)
        resident = entry.placement.resident[self._shard.dwdp_rank]
        layer.raw = RawParameters(
            layer,
            entry.placement.num_experts,
            resident,
            before_loading=partial(self._before_loading, layer),
        )
        return layer

    def begin_loading(self) -> None:
        """vLLM's reload has begun, and weights come."""
        for module in self._hidden:
            reloading.show(module)

    def _before_loading(self, layer: Any) -> None:
        """Something comes for `layer`: write those layers that have all they need.

        Raises:
            WeightUpdateError: it was written already.
        """
        if self._begun and self._begun[-1] is layer:
            return
        for begun in [each for each in self._begun if self._is_complete(each)]:
            self._write(begun)
        if layer.layer_name in self.facts:
            raise WeightUpdateError(
                f"{layer.layer_name} was given weights again after all of them had come. Send the "
                "weights of a layer one after the other, each of them once"
            )
        if layer in self._begun:
            self._begun.remove(layer)
        self._begun.append(layer)

    def finish(self) -> None:
        """Write what is left; the serving layers are in their places again.

        Raises:
            WeightUpdateError, DwdpUnsupportedError: a layer cannot be written.
        """
        while self._begun:
            self._write(self._begun[0])
        self._resources.close()

    def abandon(self) -> None:
        """Put the serving layers back, whatever is written of them."""
        self._resources.close()
        reloading.abandon(self._model)

    def _put_back(self) -> None:
        reloading.exchange(self._model, {new: e.layer for new, (_, e) in self._places.items()})

    def _is_complete(self, layer: Any) -> bool:
        wanted = self._places[layer][1].layer.raw.loaded
        return bool(wanted) and all(layer.raw.loaded.get(key) == wanted[key] for key in wanted)

    def _write(self, layer: Any) -> None:
        """Process a layer that has its weights, and write what this rank keeps of it."""
        index, entry = self._places[layer]
        self._begun.remove(layer)
        raw, device = layer.raw, self._shard.device
        _check_complete(layer.layer_name, raw, entry.layer.raw)
        device.check_room(TIMES_WHOLE * raw.whole_bytes, "processing the new weights of one layer")
        parameters = [parameter for _, parameter in raw.parameters()]
        raw.make_whole()
        with self._building():
            moe.process(layer)
        processed = ProcessedLayer(layer, device.torch_device, ())
        facts = processed.facts()
        _check_layout(layer.layer_name, entry.facts, facts)
        serving = {id(tensor) for tensor in reachable_tensors(entry.layer).values()}
        with torch.no_grad():
            for rows in processed.tensors.per_expert:
                self._write_rows(index, entry, rows)
                detach(each for each in rows.tensors if id(each.tensor) not in serving)
            for path, tensor in processed.tensors.replicated.items():
                if id(tensor) not in serving:
                    entry.replicated[path].copy_(tensor)
        for parameter in parameters:  # the loader still refers to them
            if id(parameter) not in serving:
                parameter.data = parameter.data.new_empty(0)
        self.facts[layer.layer_name] = facts
        device.release_free_memory()

    def _write_rows(self, index: int, entry: ShardedLayer, rows: ExpertRows) -> None:
        """Copy the resident rows of a storage to where this rank keeps them."""
        rank = self._shard.dwdp_rank
        own = rows.bytes_of(entry.placement.resident[rank])
        if not own.numel():
            return
        for number, weight in enumerate(entry.weights):
            if weight.layout.name == rows.name:
                start = weight.layout.resident(rank).start
                address = self._base + self._layout.layers[index].shard_offset(number, rank, start)
                place = tensor_at(
                    address, torch.uint8, (own.numel(),), self._shard.device.torch_device
                )
                place.copy_(own)
                return
        (kept,) = (kept for kept in entry.private if kept.name == rows.name)
        kept.bytes_of(entry.placement.resident[rank]).copy_(own)


def _check_complete(layer_name: str, came: RawParameters, before: RawParameters) -> None:
    """Check that a layer was given what it was loaded with first.

    Raises:
        WeightUpdateError: something is missing.
    """
    came.check_complete(layer_name)
    for name, part in before.loaded:
        if (name, part) not in came.loaded:
            raise WeightUpdateError(
                f"{layer_name} was given new weights, but no {name} ({part}). Send all weights of a "
                "layer whose experts are new"
            )


def _check_layout(layer_name: str, before: dict[str, str], now: dict[str, str]) -> None:
    """Check that new weights came out of their processing as the serving ones did.

    Raises:
        DwdpUnsupportedError: a layout, a kernel or a number in it differs.
    """
    for path in dict.fromkeys([*before, *now]):
        then, here = before.get(path, "absent"), now.get(path, "absent")
        if then.split(" #")[0] != here.split(" #")[0]:
            raise DwdpUnsupportedError(
                f"{layer_name}: with the new weights {path} is {here}, and with the old ones {then}; "
                "kernels that run have the old one. Restart all ranks with the new checkpoint instead"
            )

"""The composite tensors of one rank: how each layer sees all its experts, in place or through a slot.

Pages come from our own shard, from peers' shards (direct view) or from slots (ring view). The layout
decides which. The caller's `ExitStack` unmaps every view.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from vllm_dwdp.device.base import Device, PeerMemory, Segment, Shard, Slots
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.layout.model import LayerLayout, ModelLayout
from vllm_dwdp.layout.slots import SlotLayout
from vllm_dwdp.model_executor.sharded_layer import ShardedLayer


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """One way in which a layer sees all its experts.

    Args:
        composites: the bytes of each composite tensor, by index of the weight.
        tensors: the layer's tensors over them, by path, e.g. `w13_weight` `[num_experts, ...]`.
    """

    composites: tuple[torch.Tensor, ...] = field(repr=False)
    tensors: dict[str, torch.Tensor] = field(repr=False)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of the composite tensors."""
        return tuple(composite.data_ptr() for composite in self.composites)


@dataclass(frozen=True, kw_only=True)
class CompositeMapper:
    """Maps views of a rank's layers, indexed as `layout.layers` and `layers` are.

    Args:
        device: that made all memory below.
        layout: of the model.
        layers: the layers of the rank, in the order of the layout.
        dwdp_rank: our position in the group.
        shard: our own experts.
        peers: the other ranks' shards, by rank.
        resources: what unmaps the views.
    """

    device: Device
    layout: ModelLayout
    layers: Sequence[ShardedLayer]
    dwdp_rank: int
    shard: Shard
    peers: Mapping[int, PeerMemory]
    resources: ExitStack

    def direct_view(self, index: int) -> LayerView:
        """Return the layer's experts where they are: remote pages are the peers'."""
        layer = self.layout.layers[index]
        segments = [list(self._direct_segments(layer, n)) for n in range(len(layer.weights))]
        return self._map(index, segments)

    def ring_view(self, index: int, slots: Slots, slot: int, slot_layout: SlotLayout) -> LayerView:
        """Return the layer's experts with remote pages in slot number `slot`, which copies fill."""
        layer = self.layout.layers[index]
        segments: list[list[Segment]] = [
            list(self._own_segment(layer, n)) for n in range(len(layer.weights))
        ]
        for part in slot_layout.parts(layer, self.dwdp_rank):
            offset = slot * slot_layout.num_bytes + part.slot_offset
            segment = Segment(span=part.span, backing=slots, offset=offset, writable=True)
            segments[part.weight].append(segment)
        return self._map(index, segments)

    def _map(self, index: int, segments: list[list[Segment]]) -> LayerView:
        composites: list[torch.Tensor] = []
        tensors: dict[str, torch.Tensor] = {}
        for number, sharded in enumerate(self.layers[index].weights):
            weight = sharded.layout
            mapping = self.device.map_composite(segments[number], weight.mapped.stop)
            self.resources.callback(mapping.unmap)
            rows = tensor_at(
                mapping.address, torch.uint8, (weight.num_bytes,), self.device.torch_device
            )
            composites.append(rows)
            tensors |= {placed.path: placed.over(rows) for placed in sharded.tensors}
        return LayerView(composites=tuple(composites), tensors=tensors)

    def _direct_segments(self, layer: LayerLayout, number: int) -> Iterator[Segment]:
        backings: dict[int, Shard | PeerMemory] = {self.dwdp_rank: self.shard, **self.peers}
        for segment in layer.weights[number].direct_segments(self.dwdp_rank):
            rank, span = segment.source_rank, segment.span
            offset = layer.shard_offset(number, rank, span.start)
            yield Segment(span=span, backing=backings[rank], offset=offset)

    def _own_segment(self, layer: LayerLayout, number: int) -> Iterator[Segment]:
        pages = layer.weights[number].shard_pages(self.dwdp_rank)
        if pages:
            offset = layer.shard_offset(number, self.dwdp_rank, pages.start)
            yield Segment(span=pages, backing=self.shard, offset=offset)

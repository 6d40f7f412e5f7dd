"""Small per-expert tensors: every rank has them whole, each row from the rank that loaded its expert.

Their rows travel in the shards, packed behind the composite tensors, so that a rank that comes back
finds its own there too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_dwdp.device.base import Device, PeerMemory
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.layout.model import ModelLayout, PrivateRows
from vllm_dwdp.layout.placement import ExpertRange
from vllm_dwdp.model_executor.expert_tensors import ExpertRows
from vllm_dwdp.model_executor.sharded_layer import ShardedLayer


def layouts_of(layers: Sequence[ShardedLayer]) -> list[PrivateRows]:
    """Return the private tensors of all layers, in the order of `ModelLayout.private`."""
    return [
        PrivateRows(placement=entry.placement, row_bytes=rows.row_bytes)
        for entry in layers
        for rows in entry.private
    ]


@dataclass(frozen=True, kw_only=True)
class PrivateTensors:
    """The private tensors of one rank.

    Args:
        layers: of the rank, in the order of the layout.
        layout: of the model.
        dwdp_rank: our position in the group.
        device: where the tensors are.
    """

    layers: Sequence[ShardedLayer]
    layout: ModelLayout
    dwdp_rank: int
    device: Device

    def publish(self, area: int) -> None:
        """Write our rows into their part of our shard, which begins at address `area`."""
        for own, stored in self._own_rows(area):
            stored.copy_(own)

    def adopt(self, area: int) -> None:
        """Take our rows from the shard of an earlier start, as `publish` left them there."""
        for own, stored in self._own_rows(area):
            own.copy_(stored)

    def complete(self, peers: Mapping[int, PeerMemory]) -> None:
        """Take every other row from the rank that loaded its expert."""
        for index, rows in enumerate(self._rows()):
            for source, experts in self.layout.private[index].sources(self.dwdp_rank):
                offset = self.layout.private_offset(index, source, experts.start)
                target = rows.bytes_of(experts)
                target.copy_(self._at(peers[source].address + offset, target.numel()))

    def _rows(self) -> Iterator[ExpertRows]:
        for entry in self.layers:
            yield from entry.private

    def _own_rows(self, area: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the bytes of our rows of each tensor, in the tensor and in the shard."""
        start = self.layout.composite_bytes[self.dwdp_rank]
        for index, rows in enumerate(self._rows()):
            resident: ExpertRange = self.layout.private[index].placement.resident[self.dwdp_rank]
            own = rows.bytes_of(resident)
            if own.numel():
                offset = self.layout.private_offset(index, self.dwdp_rank, resident.start) - start
                yield own, self._at(area + offset, own.numel())

    def _at(self, address: int, num_bytes: int) -> torch.Tensor:
        return tensor_at(address, torch.uint8, (num_bytes,), self.device.torch_device)

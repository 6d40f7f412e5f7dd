"""The expert memory of ranks without a model: shards, peers, views and rings over made-up layers.

Everything below vLLM is the product's own: `ExpertShard`, `CompositeMapper`, `PrefetchRings`. On a GPU
or over the fake driver.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.device.base import Device, PeerMemory
from vllm_dwdp.device.digest import digest_host_memory
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.layout.placement import ExpertRange, Placement
from vllm_dwdp.model_executor.composites import CompositeMapper, LayerView
from vllm_dwdp.model_executor.expert_shard import ExpertShard
from vllm_dwdp.model_executor.expert_tensors import TensorOverRows
from vllm_dwdp.model_executor.raw_parameters import bytes_of
from vllm_dwdp.model_executor.rings import PrefetchRings
from vllm_dwdp.model_executor.sharded_layer import ShardedLayer
from vllm_dwdp.prefetch.ring import Ring


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """The routed experts of one layer.

    Args:
        dtype: of the weights.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """The shape of one expert's part of each weight, in vLLM's layout."""
        return {
            "w13_weight": (2 * self.intermediate_size, self.hidden_size),
            "w2_weight": (self.hidden_size, self.intermediate_size),
        }

    @property
    def expert_bytes(self) -> int:
        """The bytes of one expert."""
        return 3 * self.intermediate_size * self.hidden_size * int(self.dtype.itemsize)


def make_experts(
    shape: ExpertShape, layer: int, experts: ExpertRange, device: torch.device
) -> dict[str, torch.Tensor]:
    """Make the weights of some experts, `[len(experts), ...]`: the same in every process."""
    made = {}
    for number, (name, (rows, columns)) in enumerate(shape.weights.items()):
        whole = torch.empty(len(experts), rows, columns, dtype=shape.dtype, device=device)
        for index, expert in enumerate(range(experts.start, experts.stop)):
            generator = torch.Generator(device).manual_seed((layer * 4096 + expert) * 2 + number)
            content = torch.randn(
                rows, columns, generator=generator, device=device, dtype=torch.bfloat16
            )
            whole[index] = (content * columns**-0.5).to(shape.dtype)
        made[name] = whole
    return made


class BareLayer:
    """What the product asks of vLLM's layer once it is published."""

    def __init__(self, name: str, shape: ExpertShape) -> None:
        self.layer_name = name
        self.top_k = shape.top_k


def over_rows(name: str, num_experts: int, part: torch.Tensor) -> TensorOverRows:
    """Describe a contiguous `[num_experts, ...]` tensor of which `part` has some rows."""
    placeholder = part.new_empty(0)
    return TensorOverRows(
        path=name,
        tensor=placeholder,
        dtype=part.dtype,
        offset=0,
        shape=(num_experts, *part.shape[1:]),
        stride=part.stride(),
    )


class RankMemory:
    """One rank's shard, and what it maps of its peers; `close` gives everything back.

    Args:
        device: of this rank.
        num_layers: all of `shape`.
        experts_per_rank: resident experts, by default the rank's even share.
    """

    def __init__(
        self,
        device: Device,
        shape: ExpertShape,
        num_layers: int,
        dwdp_rank: int,
        group_size: int,
        experts_per_rank: int | None = None,
    ) -> None:
        self.device, self.shape, self.dwdp_rank = device, shape, dwdp_rank
        self.group_size = group_size
        self.peers: dict[int, PeerMemory] = {}
        self.resources = ExitStack()
        self._copied_from: Mapping[int, PeerMemory] | None = None
        config = DwdpConfig(group_size=group_size, experts_per_rank=experts_per_rank)
        self.shard = ExpertShard(config, dwdp_rank, device)
        self.resources.callback(self.shard.close)
        with ExitStack() as undo:
            undo.callback(self.resources.close)
            for number in range(num_layers):
                self._add_layer(number)
            self.layout = self.shard.seal()
            undo.pop_all()

    def _add_layer(self, number: int) -> None:
        placement = self.shard.placement(self.shape.num_experts)
        resident = placement.resident[self.dwdp_rank]
        layer: Any = BareLayer(f"layers.{number}", self.shape)
        sharded = ShardedLayer(layer=layer, placement=placement, model_number=0, run_index=number)
        weights = make_experts(self.shape, number, resident, self.device.torch_device)
        for name, part in weights.items():
            row_bytes = part[0].nbytes
            tensors = [over_rows(name, placement.num_experts, part)]
            sharded.facts[name] = f"{part.dtype} {row_bytes}"
            self.shard.add_weight(sharded, name, row_bytes, tensors)
            self.shard.fill_weight(sharded, bytes_of(part))
        self.shard.layers.append(sharded)
        self.shard.published.append(sharded)

    @property
    def placement(self) -> Placement:
        """The placement of every layer."""
        return self.shard.published[0].placement

    def handle_bytes(self, rank: int) -> tuple[int, ...]:
        """Return the bytes behind each handle of the shard of `rank`."""
        return self.device.handle_bytes(self.layout.piece_bytes(rank))

    def connect(self, peers: Mapping[int, PeerMemory]) -> None:
        """Take over the peers' shards and complete our edge pages from them."""
        for rank, peer in peers.items():
            self.peers[rank] = peer
            self.resources.callback(peer.close)
        self.shard.fill_edges(self.layout, self.peers)

    def mapper(self, peers: Mapping[int, PeerMemory] | None = None) -> CompositeMapper:
        """Make a mapper of views; `peers` may be other than what was connected (copies only)."""
        return CompositeMapper(
            device=self.device,
            layout=self.layout,
            layers=self.shard.published,
            dwdp_rank=self.dwdp_rank,
            shard=self.shard.memory,
            peers=self.peers if peers is None else peers,
            resources=self.resources,
        )

    def direct_views(self) -> list[LayerView]:
        """View every layer's experts where they are."""
        mapper = self.mapper()
        return [mapper.direct_view(index) for index in range(len(self.layout.layers))]

    def rings(
        self, peers: Mapping[int, PeerMemory] | None = None, slice_bytes: int | None = None
    ) -> PrefetchRings:
        """Make one ring over all layers; its operators are installed until `close`.

        Args:
            peers: where copies come from, if not from the peers that were connected.
            slice_bytes: None for the device's.
        """
        self._copied_from = peers
        members = [list(range(len(self.layout.layers)))]
        rings = PrefetchRings(self.mapper(peers), members, slice_bytes)
        self.resources.callback(rings.close)
        return rings

    def whole(self, layer: int) -> dict[str, torch.Tensor]:
        """Return what a view of the layer must equal: `torch.cat` over the ranks."""
        parts = [
            make_experts(self.shape, layer, span, self.device.torch_device)
            for span in _tiling(self.placement)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in self.shape.weights}

    def close(self) -> None:
        """Close views, rings, peers and the shard, in that order."""
        self.device.synchronize()
        self.resources.close()


def only_ring(rings: PrefetchRings) -> Ring:
    """Return the one ring of `RankMemory.rings`."""
    return rings.rings[0]


class HostPeer:
    """A peer's shard in pinned host memory: copies from it use a copy engine, as over a link.

    Ring views never map a peer's pages, so its address is all they need.
    """

    def __init__(self, content: torch.Tensor) -> None:
        self._content = content
        self.address = content.data_ptr()

    def digest(self) -> bytes:
        """Return what the peer would say of its content."""
        return digest_host_memory(self.address, self._content.nbytes)

    def close(self) -> None:
        """Do nothing: the tensor owns the memory."""


def peers_on_host(
    rank: RankMemory, pinned: Callable[[int], torch.Tensor]
) -> Mapping[int, PeerMemory]:
    """Copy all peers' shards of `rank` to host memory that `pinned` allocates."""
    moved: dict[int, PeerMemory] = {}
    for peer_rank, peer in rank.peers.items():
        num_bytes = rank.layout.shard_bytes(peer_rank)
        content = pinned(num_bytes)
        shape = (num_bytes,)
        content.copy_(tensor_at(peer.address, torch.uint8, shape, rank.device.torch_device))
        moved[peer_rank] = HostPeer(content)
    return moved


def _tiling(placement: Placement) -> list[ExpertRange]:
    """Return ranges that tile all experts, one per rank that starts a new one."""
    starts = sorted({span.start for span in placement.resident} | {placement.num_experts})
    return [ExpertRange(start, stop) for start, stop in pairwise(starts)]


@contextmanager
def local_ranks(
    device: Device,
    shape: ExpertShape,
    num_layers: int,
    group_size: int,
    experts_per_rank: int | None = None,
) -> Iterator[list[RankMemory]]:
    """Make all ranks of a group on one device in this process, each with its peers mapped."""
    with ExitStack() as stack:
        ranks = []
        for rank in range(group_size):
            ranks.append(RankMemory(device, shape, num_layers, rank, group_size, experts_per_rank))
            stack.callback(ranks[-1].close)
        for reader in ranks:
            reader.connect(
                {
                    peer.dwdp_rank: device.open_peer(peer.shard.memory.export())
                    for peer in ranks
                    if peer is not reader
                }
            )
        yield ranks


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors hold the same bytes, whatever their type says of equality."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return bool(
        torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
    )


def wrong_weights(view: LayerView, expected: Mapping[str, torch.Tensor]) -> Sequence[str]:
    """Return the names of the weights of a view that differ from what they must be."""
    return [name for name in expected if not same_bytes(view.tensors[name], expected[name])]

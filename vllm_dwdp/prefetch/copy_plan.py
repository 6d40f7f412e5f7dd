"""Which bytes a rank copies for one layer, in which order. Pure: planned once, issued every step."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_dwdp.layout.model import LayerLayout


@dataclass(frozen=True)
class CopySlice:
    """One copy from a peer's shard into a composite tensor of the layer.

    Args:
        peer_rank: whose shard.
        source_offset: first byte in that shard.
        weight: index of the composite tensor within the layer.
        offset: first byte in that tensor.
        num_bytes: length, at most `slice_bytes`.
    """

    peer_rank: int
    source_offset: int
    weight: int
    offset: int
    num_bytes: int


def plan_layer_copies(layer: LayerLayout, rank: int, slice_bytes: int) -> tuple[CopySlice, ...]:
    """Cover every remote byte of `layer` once, in slices that rotate over the peers.

    The rotation starts after our own rank, so that at any time the ranks of a group read from
    different peers; a fixed or random order would let them queue at one.
    """
    queues: dict[int, deque[CopySlice]] = {}
    for copy in _slices(layer, rank, slice_bytes):
        queues.setdefault(copy.peer_rank, deque()).append(copy)
    order = sorted(queues, key=lambda peer: (peer - rank) % layer.group_size)
    plan = []
    while queues:
        for peer in order:
            if peer in queues:
                plan.append(queues[peer].popleft())
                if not queues[peer]:
                    del queues[peer]
    return tuple(plan)


def bytes_by_peer(plan: tuple[CopySlice, ...]) -> dict[int, int]:
    """Bytes that a plan reads from each peer rank."""
    totals: dict[int, int] = {}
    for copy in plan:
        totals[copy.peer_rank] = totals.get(copy.peer_rank, 0) + copy.num_bytes
    return totals


def _slices(layer: LayerLayout, rank: int, slice_bytes: int) -> Iterator[CopySlice]:
    for index, weight in enumerate(layer.weights):
        for copy in weight.remote_copies(rank):
            source = layer.shard_offset(index, copy.source_rank, copy.span.start)
            for start in range(0, len(copy.span), slice_bytes):
                num_bytes = min(slice_bytes, len(copy.span) - start)
                yield CopySlice(
                    copy.source_rank, source + start, index, copy.span.start + start, num_bytes
                )

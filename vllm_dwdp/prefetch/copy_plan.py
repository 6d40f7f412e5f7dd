"""Which bytes a rank copies for one layer, in which order. Pure: planned once, issued every step.

The bytes that a rank takes from a peer are a few long *runs*, contiguous on both sides: one for each
composite tensor and part of it. Runs are cut into slices, and slices are dealt into *waves* of at most
one slice from each peer::

    slices of rank 0, in a group of four       waves of all ranks, as they are listed
    peer 1   [ a | b | c | d ]                 rank 0    a 1, 2, 3   b 1, 2, 3   ...
    peer 2   [ a | b | c | d ]                 rank 1    a 2, 3, 0   b 2, 3, 0
    peer 3   [ a | b | c | d ]                 rank 2    a 3, 0, 1   b 3, 0, 1

A device runs wave after wave, and the copies of a wave in any order: so no peer is read for a second
time before every other was read once. Within a wave peers are listed from the reader's next rank on,
so that ranks begin at different peers; in a fixed or random order they would queue at one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vllm_dwdp.layout.model import LayerLayout


@dataclass(frozen=True)
class CopySlice:
    """One copy from a peer's shard into a composite tensor of the layer.

    Args:
        peer_rank: whose shard.
        source_offset: first byte in that shard.
        weight: index of the composite tensor within the layer.
        offset: first byte in that tensor.
        num_bytes: length.
    """

    peer_rank: int
    source_offset: int
    weight: int
    offset: int
    num_bytes: int

    def cut(self, slice_bytes: int) -> Iterator["CopySlice"]:
        """Yield slices of at most `slice_bytes`, in order; 0 cuts nothing."""
        step = slice_bytes or self.num_bytes
        for start in range(0, self.num_bytes, step):
            yield replace(
                self,
                source_offset=self.source_offset + start,
                offset=self.offset + start,
                num_bytes=min(step, self.num_bytes - start),
            )


Wave = tuple[CopySlice, ...]
"""Copies without an order, at most one from each peer."""


def plan_layer_copies(layer: LayerLayout, rank: int, slice_bytes: int) -> tuple[Wave, ...]:
    """Cover every remote byte of `layer` once.

    A peer with fewer slices than another is read all along as well, not at first only: the slices of
    each are spread evenly over the waves.

    Args:
        slice_bytes: runs are cut into slices of this size; 0 leaves them whole.
    """
    slices: dict[int, list[CopySlice]] = {}
    for run in plan_layer_runs(layer, rank):
        slices.setdefault(run.peer_rank, []).extend(run.cut(slice_bytes))
    num_waves = max(map(len, slices.values()), default=0)
    waves: list[list[CopySlice]] = [[] for _ in range(num_waves)]
    for peer in sorted(slices, key=lambda peer: (peer - rank) % layer.group_size):
        for number, each in enumerate(slices[peer]):
            waves[number * num_waves // len(slices[peer])].append(each)
    return tuple(map(tuple, waves))


def plan_layer_runs(layer: LayerLayout, rank: int) -> Iterator[CopySlice]:
    """Yield the remote bytes of `layer` as runs that no two of are contiguous on both sides."""
    for index, weight in enumerate(layer.weights):
        for copy in weight.remote_copies(rank):
            source = layer.shard_offset(index, copy.source_rank, copy.span.start)
            yield CopySlice(copy.source_rank, source, index, copy.span.start, len(copy.span))


def bytes_by_peer(plan: tuple[Wave, ...]) -> dict[int, int]:
    """Bytes that a plan reads from each peer rank."""
    totals: dict[int, int] = {}
    for wave in plan:
        for copy in wave:
            totals[copy.peer_rank] = totals.get(copy.peer_rank, 0) + copy.num_bytes
    return totals

"""Byte layout of composite tensors. Pure: imports neither vLLM nor torch.

A composite tensor is one address range per (layer, weight) that looks like a contiguous
`[num_experts, ...]` tensor and is assembled from pages:

::

    expert   0        E/3       2E/3        E
    range    [  pages of rank 0 | rank 1  | pages of rank 2  ]     seen by the kernel as one tensor
    direct       peer's memory  | my shard| peer's memory          remote part maps the peers' pages
    prefetch     slot k's pages | my shard| slot k's pages         remote part maps a slot

Experts rarely end on a page boundary, so a rank's shard covers every page that its resident bytes
touch. The bytes on its first and last page that belong to a neighbour's expert (the *edges*) are
copied once from that neighbour when the group has met; after that every page of every shard is
whole, and any page can be mapped from any rank that holds its first byte. A tensor smaller than a
page is thereby simply whole on every rank.

The pages of a rank are cut into *pieces* at every place where some rank begins or stops to read them: a
device that maps only whole allocations makes one of each piece. How the tensors of a model lie in a
shard: `layout.model`; how remote pages lie in a slot: `layout.slots`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, pairwise

from vllm_dwdp.layout.placement import Placement


@dataclass(frozen=True)
class ByteRange:
    """Half-open interval `[start, stop)` of bytes."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __bool__(self) -> bool:
        return self.stop > self.start

    def intersect(self, other: "ByteRange") -> "ByteRange":
        """Return the common part; empty (false) when there is none."""
        start = max(self.start, other.start)
        return ByteRange(start, max(start, min(self.stop, other.stop)))

    def aligned(self, page_bytes: int) -> "ByteRange":
        """Return the smallest page-aligned range that covers this one."""
        return ByteRange(
            self.start // page_bytes * page_bytes, -(-self.stop // page_bytes) * page_bytes
        )


@dataclass(frozen=True)
class SourcedRange:
    """Bytes of a composite tensor and the rank that provides them."""

    source_rank: int
    span: ByteRange


@dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """Layout of one composite tensor over a group.

    Args:
        name: parameter name, e.g. `w13_weight`.
        placement: placement of the layer's experts.
        expert_bytes: bytes of one expert in this tensor.
        page_bytes: mapping granularity of the device (4 KiB on the host, 2 MiB on CUDA).
    """

    name: str
    placement: Placement
    expert_bytes: int
    page_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor `[num_experts, ...]`."""
        return self.placement.num_experts * self.expert_bytes

    @property
    def mapped(self) -> ByteRange:
        """The page-aligned address range, starting at 0."""
        return ByteRange(0, self.num_bytes).aligned(self.page_bytes)

    def resident(self, rank: int) -> ByteRange:
        """Bytes of the experts that `rank` loads."""
        experts = self.placement.resident[rank]
        return ByteRange(experts.start * self.expert_bytes, experts.stop * self.expert_bytes)

    def shard_pages(self, rank: int) -> ByteRange:
        """Page-aligned bytes that `rank` keeps in its shard; empty if it holds no expert."""
        resident = self.resident(rank)
        return resident.aligned(self.page_bytes) if resident else resident

    def edges(self, rank: int) -> tuple[SourcedRange, ...]:
        """Bytes on `rank`'s pages that it must copy once from the ranks that loaded them."""
        pages = self.shard_pages(rank)
        resident = self.resident(rank)
        before = ByteRange(pages.start, resident.start)
        after = ByteRange(resident.stop, min(pages.stop, self.num_bytes))
        return (*self._sourced(rank, before), *self._sourced(rank, after))

    def remote_pages(self, rank: int) -> tuple[ByteRange, ...]:
        """Page-aligned ranges outside `rank`'s shard: at most two, in address order."""
        pages = self.shard_pages(rank)
        low = ByteRange(0, pages.start if pages else self.mapped.stop)
        high = ByteRange(pages.stop if pages else self.mapped.stop, self.mapped.stop)
        return tuple(part for part in (low, high) if part)

    def direct_segments(self, rank: int) -> tuple[SourcedRange, ...]:
        """Page-aligned ranges that tile `mapped`, each with the rank whose shard backs it."""
        segments = [SourcedRange(rank, self.shard_pages(rank))] if self.shard_pages(rank) else []
        for part in self.remote_pages(rank):
            segments.extend(self._page_owners(rank, part))
        return tuple(sorted(segments, key=lambda segment: segment.span.start))

    def shard_pieces(self, rank: int) -> tuple[ByteRange, ...]:
        """Ranges that tile `shard_pages`, such that every rank's direct segments are whole pieces."""
        return _pieces(self)[rank]

    def remote_copies(self, rank: int) -> tuple[SourcedRange, ...]:
        """Byte ranges that fill `remote_pages`, each from the rank that `rank` reads it from."""
        return tuple(
            copy
            for part in self.remote_pages(rank)
            for copy in self._sourced(rank, part.intersect(ByteRange(0, self.num_bytes)))
        )

    @cached_property
    def _sources(self) -> dict[int, tuple[int, ...]]:
        placement = self.placement
        return {
            rank: tuple(placement.source(expert, rank) for expert in range(placement.num_experts))
            for rank in range(placement.group_size)
        }

    def _sourced(self, rank: int, span: ByteRange) -> Iterator[SourcedRange]:
        """Split `span` at the experts where the source changes."""
        if not span:
            return
        first, last = span.start // self.expert_bytes, (span.stop - 1) // self.expert_bytes
        sources = self._sources[rank]
        for source, run in groupby(range(first, last + 1), key=sources.__getitem__):
            experts = list(run)
            yield SourcedRange(
                source,
                span.intersect(
                    ByteRange(experts[0] * self.expert_bytes, (experts[-1] + 1) * self.expert_bytes)
                ),
            )

    def _page_owners(self, rank: int, part: ByteRange) -> Iterator[SourcedRange]:
        """Split page-aligned `part` by the source of each page's first byte."""
        for copy in self._sourced(rank, part.intersect(ByteRange(0, self.num_bytes))):
            start = -(-copy.span.start // self.page_bytes) * self.page_bytes
            stop = -(-copy.span.stop // self.page_bytes) * self.page_bytes
            if start < stop:
                yield SourcedRange(copy.source_rank, ByteRange(start, stop))


@lru_cache(maxsize=64)
def _pieces(weight: WeightLayout) -> tuple[tuple[ByteRange, ...], ...]:
    """`shard_pieces` of every rank; cached, because the layers of a model are mostly alike."""
    ranks = range(weight.placement.group_size)
    cuts: list[set[int]] = [
        {pages.start, pages.stop} if (pages := weight.shard_pages(rank)) else set()
        for rank in ranks
    ]
    for reader in ranks:
        for segment in weight.direct_segments(reader):
            cuts[segment.source_rank] |= {segment.span.start, segment.span.stop}
    return tuple(
        tuple(ByteRange(start, stop) for start, stop in pairwise(sorted(cuts[rank])))
        for rank in ranks
    )

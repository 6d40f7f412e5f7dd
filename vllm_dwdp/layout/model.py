"""Byte layout of a model's experts in the shards of its ranks. Pure: imports neither vLLM nor torch.

::

    shard of a rank    [ layer 0: w13 pages | w2 pages | layer 1: ... | private rows of all layers ]

Large tensors lie there page by page, as parts of composite tensors. Small ones would cost more in pages
than sharing saves: every rank keeps them whole in memory of its own, and the shard has the rows of its
resident experts packed, from which its peers copy them once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

from vllm_dwdp.layout.composite import ByteRange, WeightLayout
from vllm_dwdp.layout.placement import ExpertRange, Placement


def smallest_composite_bytes(tensor_bytes: Iterable[int], group_size: int, page_bytes: int) -> int:
    """From how many bytes on a layer's per-expert tensor is a composite, not private rows.

    It must be worth its pages: two for each rank. The largest of a layer always is one.

    Args:
        tensor_bytes: of each per-expert tensor of the layer, all experts.
    """
    worth = 2 * group_size * page_bytes
    return min(worth, max(tensor_bytes, default=worth))


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """Layout of all composite tensors of one MoE layer.

    Args:
        name: the layer's prefix in the model, e.g. `model.layers.3.mlp.experts`.
        weights: one layout per composite tensor, in registration order.
        shard_offsets: where each weight's `shard_pages` begin in every rank's shard,
            `[num_weights][group_size]`, bytes.
    """

    name: str
    weights: tuple[WeightLayout, ...]
    shard_offsets: tuple[tuple[int, ...], ...]

    @property
    def group_size(self) -> int:
        """Ranks that share the layer's experts."""
        return self.weights[0].placement.group_size

    def shard_offset(self, weight: int, rank: int, byte: int) -> int:
        """Where byte `byte` of the composite tensor lies in `rank`'s shard."""
        pages = self.weights[weight].shard_pages(rank)
        assert pages.start <= byte < pages.stop
        return self.shard_offsets[weight][rank] + byte - pages.start

    def remote_parts(self, rank: int) -> tuple[tuple[int, ByteRange], ...]:
        """Return all weights' remote pages with the index of their weight, in registration order."""
        return tuple(
            (index, part)
            for index, layout in enumerate(self.weights)
            for part in layout.remote_pages(rank)
        )

    def remote_bytes(self, rank: int) -> int:
        """Bytes of the remote pages of all weights."""
        return sum(len(part) for _, part in self.remote_parts(rank))


@dataclass(frozen=True, kw_only=True)
class PrivateRows:
    """A tensor that every rank keeps whole, and of which a shard has the resident rows.

    Args:
        placement: of the layer's experts.
        row_bytes: bytes of one expert.
    """

    placement: Placement
    row_bytes: int

    def resident_bytes(self, rank: int) -> int:
        """Bytes of the rows that `rank` provides."""
        return len(self.placement.resident[rank]) * self.row_bytes

    def sources(self, rank: int) -> Iterator[tuple[int, ExpertRange]]:
        """Yield the experts that `rank` takes from each other rank, run by run."""
        experts = range(self.placement.num_experts)
        for source, run in groupby(experts, key=lambda e: self.placement.source(e, rank)):
            listed = list(run)
            if source != rank:
                yield source, ExpertRange(listed[0], listed[-1] + 1)


@dataclass(frozen=True, kw_only=True)
class ModelLayout:
    """Layout of a model's experts: composite tensors layer by layer, then all private rows.

    Args:
        layers: in the order in which they lie in the shards.
        private: tensors of which every rank has all rows.
        page_bytes: mapping granularity of the device.
        composite_bytes: of each rank's shard, before the private rows.
    """

    layers: tuple[LayerLayout, ...]
    private: tuple[PrivateRows, ...]
    page_bytes: int
    composite_bytes: tuple[int, ...]

    @classmethod
    def plan(
        cls,
        layers: Sequence[tuple[str, tuple[WeightLayout, ...]]],
        private: Sequence[PrivateRows] = (),
    ) -> "ModelLayout":
        """Lay out the shards of all ranks: weights back to back, page by page."""
        first = layers[0][1][0]
        ends = [0] * first.placement.group_size
        planned = []
        for name, weights in layers:
            offsets = []
            for weight in weights:
                offsets.append(tuple(ends))
                for rank in range(len(ends)):
                    ends[rank] += len(weight.shard_pages(rank))
            planned.append(LayerLayout(name=name, weights=weights, shard_offsets=tuple(offsets)))
        return cls(
            layers=tuple(planned),
            private=tuple(private),
            page_bytes=first.page_bytes,
            composite_bytes=tuple(ends),
        )

    @property
    def group_size(self) -> int:
        """Ranks that share the experts."""
        return len(self.composite_bytes)

    def private_bytes(self, rank: int) -> int:
        """Bytes of the part of `rank`'s shard that has its private rows, in whole pages."""
        return len(ByteRange(0, self._private_offsets[rank][-1]).aligned(self.page_bytes))

    def private_offset(self, index: int, rank: int, expert: int) -> int:
        """Where the row of `expert` in private tensor `index` lies in `rank`'s shard."""
        rows = self.private[index]
        resident = rows.placement.resident[rank]
        assert expert in resident
        before = (expert - resident.start) * rows.row_bytes
        return self.composite_bytes[rank] + self._private_offsets[rank][index] + before

    @cached_property
    def _private_offsets(self) -> tuple[tuple[int, ...], ...]:
        """Of each private tensor behind the composite part of each rank's shard, and the end."""
        return tuple(
            tuple(accumulate((rows.resident_bytes(rank) for rows in self.private), initial=0))
            for rank in range(self.group_size)
        )

    def shard_bytes(self, rank: int) -> int:
        """Bytes of `rank`'s shard."""
        return self.composite_bytes[rank] + self.private_bytes(rank)

    def piece_bytes(self, rank: int) -> tuple[int, ...]:
        """Sizes of the pieces of `rank`'s shard, in order."""
        composites = (
            len(piece)
            for layer in self.layers
            for weight in layer.weights
            for piece in weight.shard_pieces(rank)
        )
        private = self.private_bytes(rank)
        return (*composites, private) if private else tuple(composites)

    def resident_bytes(self, rank: int) -> int:
        """Expert bytes that `rank` shares with its peers."""
        return sum(len(w.resident(rank)) for layer in self.layers for w in layer.weights)

    @property
    def total_bytes(self) -> int:
        """Bytes of one full copy of what is shared."""
        return sum(w.num_bytes for layer in self.layers for w in layer.weights)

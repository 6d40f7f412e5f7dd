"""How the remote pages of a layer lie in a prefetch slot. Pure: imports neither vLLM nor torch.

A slot has two areas: large pool pages, then single pages. A remote part takes as many pool pages as
it fills and single pages for the rest, each from the start of its area:

::

    slot      [ pool page | pool page | pool page | page | page | page ]
    layer 7   [ w13, low part         | w2, low   | w13  | w2   | w2   ]

So a device that maps only whole allocations needs few of them, and layers of different shapes share
one slot. On the host both kinds of page are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_dwdp.layout.composite import ByteRange
from vllm_dwdp.layout.model import LayerLayout


@dataclass(frozen=True)
class SlotPart:
    """Page-aligned bytes of a composite tensor and where they lie in a slot."""

    weight: int
    span: ByteRange
    slot_offset: int


@dataclass(frozen=True, kw_only=True)
class SlotLayout:
    """The areas of one slot: `num_pool_pages` of `pool_page_bytes`, then `num_pages` of `page_bytes`.

    Every layer that uses the slot starts at the beginning of both areas.
    """

    num_pool_pages: int
    num_pages: int
    pool_page_bytes: int
    page_bytes: int

    @classmethod
    def plan(cls, layers: Sequence[LayerLayout], rank: int, pool_page_bytes: int) -> "SlotLayout":
        """Return the smallest slot that holds the remote pages of any one of `layers`."""
        page_bytes = layers[0].weights[0].page_bytes
        assert pool_page_bytes % page_bytes == 0
        pool, single = [0], [0]
        for layer in layers:
            lengths = [len(part) for _, part in layer.remote_parts(rank)]
            pool.append(sum(length // pool_page_bytes for length in lengths))
            single.append(sum(length % pool_page_bytes // page_bytes for length in lengths))
        return cls(
            num_pool_pages=max(pool),
            num_pages=max(single),
            pool_page_bytes=pool_page_bytes,
            page_bytes=page_bytes,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the slot."""
        return self.num_pool_pages * self.pool_page_bytes + self.num_pages * self.page_bytes

    @property
    def allocations(self) -> tuple[int, ...]:
        """Sizes of the allocations that make up the slot, in order, bytes."""
        return (self.pool_page_bytes,) * self.num_pool_pages + (self.page_bytes,) * self.num_pages

    def parts(self, layer: LayerLayout, rank: int) -> tuple[SlotPart, ...]:
        """Where each remote byte range of `layer` lies in the slot: whole pages of either area."""
        parts = []
        pool, single = 0, self.num_pool_pages * self.pool_page_bytes
        for weight, span in layer.remote_parts(rank):
            middle = span.stop - len(span) % self.pool_page_bytes
            for piece, offset in (
                (ByteRange(span.start, middle), pool),
                (ByteRange(middle, span.stop), single),
            ):
                if piece:
                    parts.append(SlotPart(weight, piece, offset))
            pool += middle - span.start
            single += span.stop - middle
        return tuple(parts)

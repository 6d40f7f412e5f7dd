"""One of the things that a layer keeps of a sequence, and how its entries lie in memory. Pure."""

from dataclasses import dataclass
from typing import NamedTuple

from vllm_dwdp.planner.states import NO_STATE, LayerState

INDEX_GROUP, INDEX_SCALE_BYTES = 128, 4
"""An indexer keeps a key in FP8, and a scale for each so many of its elements."""
PACKED_BITS, ROTARY_BYTES = 8, 2
"""Of a latent that is kept in so many bits, the rotary part still has so many bytes an element."""


class Scoring(NamedTuple):
    """What an indexer does for a query: it scores entries, of which the best are attended to.

    Args:
        operations: of its products.
        num_bytes: of the keys that it reads.
    """

    operations: float
    num_bytes: float


@dataclass(frozen=True, kw_only=True)
class CachePart:
    """One of the things that a layer keeps of a sequence; nothing, if nothing is given.

    Args:
        elements: of keys and values, or of their latent, per entry; what is packed beside them counts
            as so many more.
        own_bytes: per entry, of what has a type of its own: an indexer's keys, a compressor's state.
        window: the most tokens kept; 0 for all.
        is_chunk: the window is a chunk, of which a token sees half in the mean.
        tokens_per_entry: that are compressed into one.
        most_seen: the entries that a query attends to, which an indexer chooses; 0 for all.
        index_dim: sum over the heads of an indexer of their sizes: a query and an entry cost
            `2 * index_dim` operations.
        index_bits: that its products run in.
        state: of a sequence of any length.
    """

    elements: int = 0
    own_bytes: int = 0
    window: int = 0
    is_chunk: bool = False
    tokens_per_entry: int = 1
    most_seen: int = 0
    index_dim: int = 0
    index_bits: int = 8
    state: LayerState = NO_STATE

    def token_bytes(self, kv_bits: float) -> float:
        """Return the bytes of a token that is kept."""
        return (self.elements * kv_bits / 8 + self.own_bytes) / self.tokens_per_entry

    def keys_seen(self, mean_keys: float) -> float:
        """Return the entries that a query attends to, where all tokens would be `mean_keys`."""
        if not self.elements:
            return 0.0
        entries = self._entries(mean_keys)
        return min(entries, self.most_seen) if self.most_seen else entries

    def read_bytes(self, mean_keys: float, kv_bits: float) -> float:
        """Return what attention reads of it for a query."""
        attended = self.keys_seen(mean_keys) * self.elements * kv_bits / 8
        return attended + (0.0 if self.index_dim else self._entries(mean_keys) * self.own_bytes)

    def scoring(self, mean_keys: float) -> Scoring:
        """Return what an indexer does for a query, which scores every entry."""
        if not self.index_dim:
            return Scoring(0.0, 0.0)
        entries = self._entries(mean_keys)
        return Scoring(2 * entries * self.index_dim, entries * self.own_bytes)

    def _entries(self, mean_keys: float) -> float:
        narrow = self.window / 2 if self.is_chunk else self.window
        return (min(mean_keys, narrow) if self.window else mean_keys) / self.tokens_per_entry


def packed(plain: int, rotary: int, scale_bytes: int, kv_bits: float) -> int:
    """Count a latent of `plain` and `rotary` elements in elements of `kv_bits`.

    With 8 bits sparse attention has a layout of its own (`fp8_ds_mla`): the rotary part stays in 16
    bits, and scales lie beside.
    """
    if kv_bits != PACKED_BITS:
        return plain + rotary
    return plain + ROTARY_BYTES * rotary + scale_bytes


def index_bytes(size: int) -> int:
    """Return the bytes of an indexer's key of so many elements."""
    return size + size // INDEX_GROUP * INDEX_SCALE_BYTES

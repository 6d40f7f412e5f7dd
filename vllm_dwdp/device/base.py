"""The seam between DWDP and a device's memory: what `device.host` and `device.cuda` both do.

Shards, peers' shards and slots are *backings*: composite tensors are assembled from their pages. A
backing belongs to the device that made it, and only that device maps it. Copies between addresses in
the background are `device.queue.CopyQueue`, which a device also makes.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vllm_dwdp.device.queue import CopyQueue
from vllm_dwdp.layout.composite import ByteRange
from vllm_dwdp.layout.slots import SlotLayout


@dataclass(frozen=True, kw_only=True)
class Handles:
    """What a shard is passed by, piece by piece or whole; its descriptors have one owner.

    Args:
        fds: file descriptors, between processes of one host.
        fabric: CUDA fabric handles, between processes of one NVLink domain. One of the two may be
            empty; where neither is, either will do.
        num_bytes: behind each handle.
    """

    fds: tuple[int, ...] = ()
    fabric: tuple[bytes, ...] = ()
    num_bytes: tuple[int, ...]

    def close(self) -> None:
        """Close the descriptors; memory that was imported through them stays."""
        for fd in self.fds:
            os.close(fd)


class Mapping(Protocol):
    """An address range. Its maker calls `unmap` once; tensors over it must be gone."""

    @property
    def address(self) -> int:
        """First byte."""

    @property
    def num_bytes(self) -> int:
        """Length, a multiple of the page size."""

    def unmap(self) -> None:
        """Give the range back."""


class Shard(Protocol):
    """This rank's experts, appended weight by weight, then sealed. `close` is idempotent."""

    num_bytes: int

    @property
    def is_adopted(self) -> bool:
        """Whether it is the memory of an earlier start of this rank: whole, as a start finds it."""

    def append(self, piece_bytes: Sequence[int]) -> Mapping:
        """Return the next part of the shard, one range over pieces of these sizes.

        The mapping is owned by the shard and lives until `finish`.

        Raises:
            DwdpMemoryError: there is too little memory, or an adopted shard has other pieces.
        """

    def seal(self) -> None:
        """Seal the layout: no part is added afterwards.

        Raises:
            DwdpMemoryError: an adopted shard has more than was appended.
        """

    def export(self) -> Handles:
        """For peers, in order of the pieces; descriptors are owned by the caller."""

    def digest(self) -> bytes:
        """Digest every byte where it lies, as `device.digest` does."""

    def finish(self) -> None:
        """Drop our own writable mappings: the content is final until `map_writable`."""

    def map_writable(self) -> Mapping:
        """All of a sealed shard, writable for its owner: for new weights; the caller unmaps it.

        Raises:
            DwdpMemoryError: it cannot be mapped.
        """

    def close(self) -> None:
        """Release it; peers that mapped it keep the memory."""


class PeerMemory(Protocol):
    """A peer's shard, mapped read-only as one range; `close` unmaps it."""

    @property
    def address(self) -> int:
        """Of the shard's first byte."""

    def digest(self) -> bytes:
        """As the `digest` of the shard that it is."""

    def close(self) -> None:
        """Give it back; composite tensors that map its pages keep them."""


class Slots(Protocol):
    """Prefetch slots, private to this process; reached through composite tensors only."""

    def close(self) -> None:
        """Release the memory; composites over it must be gone."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One piece of a composite tensor: `span` of it is `backing` from byte `offset` on.

    Args:
        writable: whether copies may write through the composite tensor (slots).
    """

    span: ByteRange
    backing: Any
    offset: int
    writable: bool = False


class Device(Protocol):
    """One device. Runs in the worker's main thread, at load time only."""

    @property
    def page_bytes(self) -> int:
        """Granularity of mappings."""

    @property
    def pool_page_bytes(self) -> int:
        """Size of the large pages of a slot, a multiple of `page_bytes`."""

    @property
    def torch_device(self) -> torch.device:
        """Where tensors over its addresses live."""

    @property
    def captures_graphs(self) -> bool:
        """Whether forwards may run inside captured graphs; then `make_queue` makes `GraphQueue`s."""

    @property
    def copies_share_compute(self) -> bool:
        """Whether copies take the cores and the memory that compute, so that direct always wins."""

    def memory_info(self) -> tuple[int, int]:
        """Bytes of its memory that are free, and all of them."""

    def users(self) -> str:
        """Which processes hold how much of its memory, in words; empty where that is unknown."""

    def check_room(self, num_bytes: int, purpose: str) -> None:
        """Refuse before memory runs out.

        Raises:
            DwdpMemoryError: less than `num_bytes` are available.
        """

    def mapping_counts(self) -> dict[str, int]:
        """Count what is mapped now, by kind; empty where nothing limits it."""

    def handle_bytes(self, piece_bytes: Sequence[int]) -> tuple[int, ...]:
        """Bytes behind each handle that a shard of these pieces is passed by."""

    def new_shard(self, name: str) -> Shard:
        """Return an empty shard, owned by the caller."""

    def adopt_shard(self, handles: Handles) -> Shard:
        """Return the memory of an earlier start of this rank; owns `handles` once it returns.

        Raises:
            DwdpMemoryError, TransferError: the handles cannot be used; they stay the caller's.
        """

    def open_peer(self, handles: Handles) -> PeerMemory:
        """Return a peer's whole shard; owns `handles` once it returns.

        Raises:
            DwdpMemoryError, TransferError: as `adopt_shard`.
        """

    def new_slots(self, num_slots: int, layout: SlotLayout) -> Slots:
        """Slots one after the other, each of `layout.num_bytes`."""

    def map_composite(self, segments: Sequence[Segment], num_bytes: int) -> Mapping:
        """Assemble `[0, num_bytes)` from page-aligned segments that tile it.

        Raises:
            DwdpMemoryError: a piece cannot be mapped, or not as part of this range; all of it is
                given back. A view over other memory may still be possible.
        """

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        """Copy between two addresses and return when it is done."""

    def release_free_memory(self) -> None:
        """Return memory of freed tensors, which an allocator keeps, to the device."""

    def make_queue(self) -> CopyQueue:
        """Return a queue for background copies, closed by the caller."""

    def synchronize(self) -> None:
        """Block until everything that was enqueued on the device is done."""

    def close(self) -> None:
        """Release the device itself; everything made from it is closed."""

"""The host device: composite tensors by mmap, over the memory that `host_memory` makes.

Runs in the worker's main thread, at load time only.
"""

import ctypes
from collections.abc import Sequence

import psutil
import torch

from vllm_dwdp.device.base import Handles, Segment
from vllm_dwdp.device.host_memory import AdoptedShard, HostPeer, HostShard, HostSlots, sealed_file
from vllm_dwdp.device.host_queue import HostCopyQueue
from vllm_dwdp.device.limits import available_bytes, check_available, release_free_heap
from vllm_dwdp.device.pages import PAGE_BYTES, Mapping, map_composite
from vllm_dwdp.layout.slots import SlotLayout


class HostDevice:
    """Implements `device.base.Device` over shared memory of this host; nothing to close."""

    page_bytes = PAGE_BYTES
    pool_page_bytes = PAGE_BYTES
    torch_device = torch.device("cpu")
    captures_graphs = False
    copies_share_compute = True

    def memory_info(self) -> tuple[int, int]:
        """Of this host, or of the container if that has less."""
        return available_bytes(), psutil.virtual_memory().total

    def users(self) -> str:
        """Return nothing: the kernel does not tell."""
        return ""

    def check_room(self, num_bytes: int, purpose: str) -> None:
        """As `check_available`."""
        check_available(num_bytes, purpose)

    def mapping_counts(self) -> dict[str, int]:
        """Count nothing: the kernel's limit is far away."""
        return {}

    def handle_bytes(self, piece_bytes: Sequence[int]) -> tuple[int, ...]:
        """One memfd, whatever the pieces."""
        return (sum(piece_bytes),)

    def new_shard(self, name: str) -> HostShard:
        """Return an empty memfd."""
        return HostShard(name)

    def adopt_shard(self, handles: Handles) -> AdoptedShard:
        """Return the memfd of an earlier start."""
        return AdoptedShard(*sealed_file(handles))

    def open_peer(self, handles: Handles) -> HostPeer:
        """Return a peer's memfd."""
        return HostPeer(*sealed_file(handles))

    def new_slots(self, num_slots: int, layout: SlotLayout) -> HostSlots:
        """Slots in one memfd."""
        return HostSlots(num_slots * layout.num_bytes)

    def map_composite(self, segments: Sequence[Segment], num_bytes: int) -> Mapping:
        """As the function of this name."""
        return map_composite(segments, num_bytes)

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        """Copy between two addresses of this process."""
        ctypes.memmove(destination, source, num_bytes)

    def release_free_memory(self) -> None:
        """As `release_free_heap`."""
        release_free_heap()

    def make_queue(self) -> HostCopyQueue:
        """Native copy threads."""
        return HostCopyQueue()

    def synchronize(self) -> None:
        """Kernels on the host return when they are done."""

    def close(self) -> None:
        """Nothing is held."""

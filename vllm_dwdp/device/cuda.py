"""The CUDA device: shards, peers, slots and composite tensors in driver virtual memory.

A mapping is always a whole allocation from its start (the driver takes no other offset), so a shard is
one allocation per piece of its layout, and a slot is made of large pool pages and single pages. Peers
receive one handle per piece, or two: a POSIX file descriptor where they are on this host, and a fabric
handle where the NVLink domain makes them. Memory outlives its exporter while a process maps it or holds
a descriptor.
Addresses are the device's; the torch tensors over them are built elsewhere.

Runs in the worker's main thread, at load time only. What of it ran on hardware is said in docs/gpu.md.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import torch

from vllm_dwdp.device.allocations import Allocations
from vllm_dwdp.device.base import Handles, Segment
from vllm_dwdp.device.cuda_driver import CudaDevice
from vllm_dwdp.device.cuda_queue import CudaQueue
from vllm_dwdp.device.vmm import CudaMapping, VirtualMemory
from vllm_dwdp.errors import DwdpMemoryError
from vllm_dwdp.layout.slots import SlotLayout

POOL_PAGE_BYTES = 16 * 2**20


class CudaShard:
    """This rank's experts, one exportable allocation per piece, or those of an earlier start."""

    def __init__(self, memory: VirtualMemory, adopted: Allocations | None = None) -> None:
        self._memory = memory
        self.is_adopted = adopted is not None
        self.num_bytes = 0
        self.allocations = adopted if adopted is not None else Allocations(memory.device)
        self._mappings: list[CudaMapping] = []

    def append(self, piece_bytes: Sequence[int]) -> CudaMapping:
        """Return the next pieces as one range; new ones are allocated, and hold whatever they held."""
        num_bytes = sum(piece_bytes)
        if self.is_adopted:
            self._check_fits(piece_bytes)
        else:
            for size in piece_bytes:
                self.allocations.add(
                    self._memory.allocate(size, "this rank's experts", shared=True)
                )
        allocations = list(self.allocations.between(self.num_bytes, num_bytes))
        mapping = self._memory.map_range(allocations, writable=not self.is_adopted)
        self._mappings.append(mapping)
        self.num_bytes += num_bytes
        return mapping

    def _check_fits(self, piece_bytes: Sequence[int]) -> None:
        ours = [allocation.num_bytes for allocation in self.allocations]
        start, offset = 0, 0
        while offset < self.num_bytes:
            offset += ours[start]
            start += 1
        if ours[start : start + len(piece_bytes)] != list(piece_bytes):
            raise DwdpMemoryError(
                "the shard that a peer kept for this rank has other pieces than this model needs. "
                "Restart all ranks of the group."
            )

    def seal(self) -> None:
        """Device memory cannot be sealed; peers map it read-only where the driver can.

        Raises:
            DwdpMemoryError: the layout of the model does not fill an adopted shard.
        """
        if self.is_adopted and self.num_bytes != self.allocations.num_bytes:
            raise DwdpMemoryError(
                f"the shard that a peer kept for this rank has {self.allocations.num_bytes} bytes, but "
                f"this model needs {self.num_bytes}. Restart all ranks of the group."
            )

    def export(self) -> Handles:
        """One handle per piece."""
        return self._memory.export(self.allocations)

    def digest(self) -> bytes:
        """As `device.digest` says, by kernels of this device."""
        whole = self._memory.map_range(list(self.allocations), writable=False)
        try:
            return self._memory.digest(whole)
        finally:
            whole.unmap()

    def finish(self) -> None:
        """Drop our own mappings; composites have theirs."""
        while self._mappings:
            self._mappings.pop().unmap()

    def map_writable(self) -> CudaMapping:
        """As `Shard.map_writable`: every piece once more, as one range."""
        return self._memory.map_range(list(self.allocations), writable=True)

    def close(self) -> None:
        """Drop the mappings and the handles."""
        self.finish()
        self.allocations.release()


class CudaPeer:
    """A peer's shard, mapped whole and read-only where the driver can."""

    def __init__(self, memory: VirtualMemory, allocations: Allocations) -> None:
        self.allocations = allocations
        self._memory = memory
        with ExitStack() as undo:
            undo.callback(allocations.release)
            self._view = memory.map_range(list(allocations), writable=False)
            undo.pop_all()
        self.address = self._view.address

    def digest(self) -> bytes:
        """As `CudaShard.digest`."""
        return self._memory.digest(self._view)

    def close(self) -> None:
        """Unmap it and release the handles."""
        self._view.unmap()
        self.allocations.release()


class CudaSlots:
    """Slots of pool pages and single pages, private to this process."""

    def __init__(self, memory: VirtualMemory, num_slots: int, layout: SlotLayout) -> None:
        self.allocations = Allocations(memory.device)
        with ExitStack() as undo:
            undo.callback(self.allocations.release)
            for size in layout.allocations * num_slots:
                self.allocations.add(memory.allocate(size, "the prefetch slots", shared=False))
            undo.pop_all()

    def close(self) -> None:
        """Release the memory; what is mapped stays until it is unmapped."""
        self.allocations.release()


class CudaMemory:
    """Implements `device.base.Device` over one CUDA device; `close` last.

    Args:
        ordinal: the device, as this process counts them; torch's current one.
        carries_fds: whether file descriptors reach the peers; else only fabric handles do.
        torch_device: where tensors over its memory live, by default `cuda:<ordinal>`.
        clear_cache: returns memory that torch keeps of freed tensors to the device.

    Raises:
        TransferError: there is no driver, or no such device.
        DwdpUnsupportedError: the device makes no handle that could be passed to the peers.
    """

    captures_graphs = True
    copies_share_compute = False

    def __init__(
        self,
        ordinal: int,
        *,
        carries_fds: bool = True,
        torch_device: torch.device | None = None,
        clear_cache: Callable[[], None] = torch.cuda.empty_cache,
    ) -> None:
        self.torch_device = torch_device or torch.device("cuda", ordinal)
        self.device = CudaDevice(ordinal)
        try:
            self.memory = VirtualMemory(
                self.device, torch_device=self.torch_device, carries_fds=carries_fds
            )
        except BaseException:
            self.device.close()
            raise
        self.page_bytes = self.memory.page_bytes
        self.pool_page_bytes = max(POOL_PAGE_BYTES, self.page_bytes)
        self._clear_cache = clear_cache

    def memory_info(self) -> tuple[int, int]:
        """As the driver says."""
        return self.device.free_bytes, self.device.total_bytes

    def users(self) -> str:
        """Return what NVML says, where nvidia-ml-py is installed."""
        with suppress(Exception):  # whatever NVML raises: this is for a line of a log
            return "; ".join(torch.cuda.list_gpu_processes(self.torch_device).splitlines())
        return ""

    def check_room(self, num_bytes: int, purpose: str) -> None:
        """Nothing: torch has allocated the model's tensors by now, and the driver checks the rest."""

    def mapping_counts(self) -> dict[str, int]:
        """Ranges, the allocations in them, and how many of those are peers'."""
        return dict(self.memory.mapped)

    def handle_bytes(self, piece_bytes: Sequence[int]) -> tuple[int, ...]:
        """One handle of each kind per piece."""
        return tuple(piece_bytes)

    def new_shard(self, name: str) -> CudaShard:
        """Return an empty shard; device memory has no names."""
        return CudaShard(self.memory)

    def adopt_shard(self, handles: Handles) -> CudaShard:
        """Return the allocations of an earlier start of this rank."""
        shard = CudaShard(self.memory, self.memory.import_pieces(handles, is_peers=False))
        handles.close()
        return shard

    def open_peer(self, handles: Handles) -> CudaPeer:
        """Return a peer's allocations, mapped."""
        peer = CudaPeer(self.memory, self.memory.import_pieces(handles, is_peers=True))
        handles.close()
        return peer

    def new_slots(self, num_slots: int, layout: SlotLayout) -> CudaSlots:
        """Slots in pooled pages."""
        return CudaSlots(self.memory, num_slots, layout)

    def map_composite(self, segments: Sequence[Segment], num_bytes: int) -> CudaMapping:
        """One range over whole allocations of several backings, with one access for all of it."""
        ordered = sorted(segments, key=lambda segment: segment.span.start)
        allocations = [
            allocation
            for segment in ordered
            for allocation in segment.backing.allocations.between(segment.offset, len(segment.span))
        ]
        assert sum(allocation.num_bytes for allocation in allocations) == num_bytes
        return self.memory.map_range(allocations, writable=any(each.writable for each in segments))

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        """Copy between two device addresses and return when it is done."""
        self.device.copy(destination, source, num_bytes)

    def release_free_memory(self) -> None:
        """Return what torch's allocator keeps of freed weights to the device."""
        self._clear_cache()

    def make_queue(self) -> CudaQueue:
        """Return a copy stream."""
        return CudaQueue(self.device)

    def synchronize(self) -> None:
        """Block until the device is idle."""
        self.device.synchronize()

    def close(self) -> None:
        """Drop the context."""
        self.device.close()

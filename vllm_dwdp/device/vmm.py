"""CUDA virtual memory: allocations without addresses, and address ranges over whole ones.

Owns the choice of handle type, and the fallback where a driver maps nothing read-only. Shards, peers and
slots are made of it in `device.cuda`. Source: CUDA driver API, section Virtual Memory Management.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from vllm_dwdp.device.base import Handles
from vllm_dwdp.device.cuda_driver import CudaDevice, HandleType, ReadOnlyAccessError
from vllm_dwdp.device.digest import digest_pieces
from vllm_dwdp.errors import DwdpMemoryError, DwdpUnsupportedError
from vllm_dwdp.logger import format_gib, init_logger

logger = init_logger(__name__)


@dataclass(frozen=True)
class CudaMapping:
    """An address range of the device, and how it is given back."""

    address: int
    num_bytes: int
    _undo: ExitStack = field(repr=False, default_factory=ExitStack)

    def unmap(self) -> None:
        """Unmap every allocation and free the addresses."""
        self._undo.close()


@dataclass(frozen=True)
class Allocation:
    """`num_bytes` of device memory; whoever made or imported it releases `handle` once."""

    handle: int
    num_bytes: int


class Allocations:
    """Allocations one after the other, addressed by byte offset; `release` gives the handles back.

    What is mapped stays: mappings hold the memory, not the handles.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._allocations: dict[int, Allocation] = {}
        self.num_bytes = 0

    def add(self, allocation: Allocation) -> None:
        """Append an allocation, owned from now on."""
        self._allocations[self.num_bytes] = allocation
        self.num_bytes += allocation.num_bytes

    def between(self, offset: int, num_bytes: int) -> Iterator[Allocation]:
        """The whole allocations that make up `[offset, offset + num_bytes)`."""
        end = offset + num_bytes
        while offset < end:
            allocation = self._allocations[offset]
            assert offset + allocation.num_bytes <= end, "a segment ends within an allocation"
            yield allocation
            offset += allocation.num_bytes

    def __iter__(self) -> Iterator[Allocation]:
        return iter(self._allocations.values())

    def release(self) -> None:
        """Release every handle."""
        while self._allocations:
            self._device.release(self._allocations.popitem()[1].handle)


class VirtualMemory:
    """Allocates and maps memory of one device.

    Args:
        device: the device; the caller closes it.
        fabric: whether shared memory is passed to other hosts; else to processes of this one.

    Raises:
        DwdpUnsupportedError: `fabric` was asked for, and the device has no fabric handles.
    """

    def __init__(self, device: CudaDevice, *, fabric: bool) -> None:
        if fabric and not device.supports_fabric:
            raise DwdpUnsupportedError(
                f"CUDA device {device.ordinal} makes no fabric memory handles, which ranks on several "
                "hosts (tcp://) need: an NVLink domain of several hosts, and its IMEX service running "
                "on each. Use unix:///folder for the ranks of one host."
            )
        self.device = device
        self._fabric = fabric
        self._read_only_works = True

    def allocate(self, num_bytes: int, purpose: str, *, shared: bool) -> Allocation:
        """New memory without an address.

        Raises:
            DwdpMemoryError: the device has not enough.
        """
        kind: HandleType = "none"
        if shared:
            kind = "fabric" if self._fabric else "posix_fd"
        try:
            handle = self.device.create(num_bytes, handle_type=kind)
        except DwdpMemoryError as error:
            raise DwdpMemoryError(
                f"{purpose} need {format_gib(num_bytes)} more of device memory, of which "
                f"{format_gib(self.device.free_bytes)} are free: {error}. Use more ranks per group, "
                "fewer experts_per_rank, or a device with nothing else on it."
            ) from error
        return Allocation(handle, num_bytes)

    def map_range(self, allocations: Sequence[Allocation], *, writable: bool) -> CudaMapping:
        """Map whole allocations one after the other."""
        num_bytes = sum(allocation.num_bytes for allocation in allocations)
        if not num_bytes:
            return CudaMapping(0, 0)
        with ExitStack() as undo:
            address = self.device.reserve(num_bytes)
            undo.callback(self.device.free_address, address, num_bytes)
            offset = 0
            for each in allocations:
                self.device.map(address + offset, each.num_bytes, each.handle)
                undo.callback(self.device.unmap, address + offset, each.num_bytes)
                offset += each.num_bytes
            self._allow(address, num_bytes, writable=writable)
            return CudaMapping(address, num_bytes, undo.pop_all())

    def export(self, allocations: Allocations) -> Handles:
        """A handle of each allocation, for peers; descriptors are owned by the caller."""
        num_bytes = tuple(each.num_bytes for each in allocations)
        if self._fabric:
            names = tuple(self.device.export_fabric(each.handle) for each in allocations)
            return Handles(fabric=names, num_bytes=num_bytes)
        fds: list[int] = []
        with ExitStack() as undo:
            for each in allocations:
                fds.append(self.device.export_fd(each.handle))
                undo.callback(os.close, fds[-1])
            undo.pop_all()
        return Handles(fds=tuple(fds), num_bytes=num_bytes)

    def digest(self, mapping: CudaMapping) -> bytes:
        """The digest of a mapped range, as the host reads it."""

        def read(start: int, num_bytes: int) -> bytes:
            return self.device.read(mapping.address + start, num_bytes)

        return digest_pieces(read, mapping.num_bytes)

    def _allow(self, address: int, num_bytes: int, *, writable: bool) -> None:
        """Set access; a driver that cannot map read-only gets a writable mapping, said once."""
        if not writable and self._read_only_works:
            try:
                self.device.set_access(address, num_bytes, writable=False)
                return
            except ReadOnlyAccessError as error:
                self._read_only_works = False
                logger.warning(
                    "DWDP: this driver maps no device memory read-only (%s): peers' experts are "
                    "mapped writable, though nothing writes them",
                    error,
                )
        self.device.set_access(address, num_bytes, writable=True)

    def import_pieces(self, handles: Handles) -> Allocations:
        """A shard's pieces; the descriptors stay the caller's."""
        imported = Allocations(self.device)
        with ExitStack() as undo:
            undo.callback(imported.release)
            given: tuple[int | bytes, ...] = handles.fabric if self._fabric else handles.fds
            if len(given) != len(handles.num_bytes):
                raise DwdpMemoryError(
                    f"a shard of {len(handles.num_bytes)} pieces came with {len(given)} handles. "
                    "Start every rank with the same version and the same kind of rendezvous."
                )
            for each, num_bytes in zip(given, handles.num_bytes, strict=True):
                handle = (
                    self.device.import_fabric(each)
                    if isinstance(each, bytes)
                    else self.device.import_fd(each)
                )
                imported.add(Allocation(handle, num_bytes))
            undo.pop_all()
        return imported

"""CUDA virtual memory: allocations without addresses, and address ranges over whole ones.

Owns the choice of handle types and the count of what is mapped. Shards, peers and slots are made of it
in `device.cuda`. Source: CUDA driver API, section Virtual Memory Management.
"""

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from vllm_dwdp.device.access import RangeAccess
from vllm_dwdp.device.allocations import Allocation, Allocations
from vllm_dwdp.device.base import Handles
from vllm_dwdp.device.cuda_driver import CudaDevice, HandleType
from vllm_dwdp.device.digest import digest_tensor
from vllm_dwdp.device.tensor import tensor_at
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


class VirtualMemory:
    """Allocates and maps memory of one device.

    Args:
        device: the device; the caller closes it.
        torch_device: the same as torch names it, whose kernels make digests.
        carries_fds: whether file descriptors reach the peers; fabric handles always do.

    Raises:
        DwdpUnsupportedError: the device makes no handle that could be passed to the peers.
    """

    def __init__(
        self, device: CudaDevice, *, torch_device: torch.device, carries_fds: bool
    ) -> None:
        self.device = device
        self._torch_device = torch_device
        self.handle_type = _passable(device, carries_fds)
        self.page_bytes = max(device.granularity_bytes, device.granularity_of(self.handle_type))
        self.mapped: Counter[str] = Counter(ranges=0, allocations=0, peer_allocations=0)
        self.access = RangeAccess(device)

    def allocate(self, num_bytes: int, purpose: str, *, shared: bool) -> Allocation:
        """Create memory without an address.

        Raises:
            DwdpMemoryError: the device has not enough.
        """
        kind: HandleType = self.handle_type if shared else "none"
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
        """Map whole allocations one after the other.

        Args:
            writable: whether it must be; else it is where the driver can do nothing better.

        Raises:
            DwdpMemoryError: the driver refuses; nothing stays mapped.
        """
        num_bytes = sum(allocation.num_bytes for allocation in allocations)
        if not num_bytes:
            return CudaMapping(0, 0)
        with ExitStack() as undo:
            address = self.device.reserve(num_bytes)
            undo.callback(self.device.free_address, address, num_bytes)
            offset = 0
            for each in allocations:
                self._map(address + offset, each, undo)
                offset += each.num_bytes
            self.access.allow(address, allocations, writable=writable)
            self._count(undo, "ranges")
            return CudaMapping(address, num_bytes, undo.pop_all())

    def _map(self, address: int, allocation: Allocation, undo: ExitStack) -> None:
        try:
            self.device.map(address, allocation.num_bytes, allocation.handle)
        except DwdpMemoryError as error:
            if not allocation.is_peers:
                raise
            raise DwdpMemoryError(
                f"{error}. It is memory of a peer, of which this process has mapped "
                f"{self.mapped['peer_allocations']} allocations already. If that is how many this GPU "
                'or its NVLink fabric takes, set dwdp mode to "prefetch", which maps each of them '
                "once, or use fewer ranks per group."
            ) from error
        undo.callback(self.device.unmap, address, allocation.num_bytes)
        self._count(undo, "allocations")
        if allocation.is_peers:
            self._count(undo, "peer_allocations")

    def _count(self, undo: ExitStack, kind: str) -> None:
        self.mapped[kind] += 1
        undo.callback(self.mapped.subtract, {kind: 1})

    def export(self, allocations: Allocations) -> Handles:
        """Every handle that peers can be passed; descriptors are owned by the caller."""
        num_bytes = tuple(each.num_bytes for each in allocations)
        names: tuple[bytes, ...] = ()
        if self.handle_type in ("fabric", "both"):
            names = tuple(self.device.export_fabric(each.handle) for each in allocations)
        fds: list[int] = []
        with ExitStack() as undo:
            for each in allocations if self.handle_type in ("posix_fd", "both") else ():
                fds.append(self.device.export_fd(each.handle))
                undo.callback(os.close, fds[-1])
            undo.pop_all()
        return Handles(fds=tuple(fds), fabric=names, num_bytes=num_bytes)

    def digest(self, mapping: CudaMapping) -> bytes:
        """Return the digest of a mapped range, made on the device; only its sums travel to the host."""
        words = (mapping.num_bytes // torch.int64.itemsize,)
        return digest_tensor(tensor_at(mapping.address, torch.int64, words, self._torch_device))

    def import_pieces(self, handles: Handles, *, is_peers: bool) -> Allocations:
        """Return a shard's pieces; the descriptors stay the caller's.

        By descriptors, or where these cannot be imported and fabric handles came too, by those.

        Raises:
            DwdpMemoryError: by neither.
        """
        kinds: list[Sequence[int | bytes]] = [
            kind for kind in (handles.fds, handles.fabric) if kind
        ] or [()]
        for kind in kinds[:-1]:
            try:
                return self._import(kind, handles.num_bytes, is_peers)
            except DwdpMemoryError as error:
                logger.warning(
                    "DWDP imports the shard of a peer by its CUDA fabric handles, because its file "
                    "descriptors cannot be imported: %s",
                    error,
                )
        return self._import(kinds[-1], handles.num_bytes, is_peers)

    def _import(
        self, given: Sequence[int | bytes], sizes: Sequence[int], is_peers: bool
    ) -> Allocations:
        if len(given) != len(sizes):
            raise DwdpMemoryError(
                f"a shard of {len(sizes)} pieces came with {len(given)} handles. "
                "Start every rank with the same version and the same kind of rendezvous."
            )
        imported = Allocations(self.device)
        with ExitStack() as undo:
            undo.callback(imported.release)
            for each, num_bytes in zip(given, sizes, strict=True):
                handle = (
                    self.device.import_fabric(each)
                    if isinstance(each, bytes)
                    else self.device.import_fd(each)
                )
                imported.add(Allocation(handle, num_bytes, is_peers))
            undo.pop_all()
        return imported


def _passable(device: CudaDevice, carries_fds: bool) -> HandleType:
    """Return the handle types of shared memory: all that work here and can be passed to peers.

    Descriptors keep memory alive, fabric handles are imported where descriptors are not; together they
    serve whatever the peer can.

    Raises:
        DwdpUnsupportedError: nothing does.
    """
    wanted: tuple[HandleType, ...] = ("both", "posix_fd", "fabric") if carries_fds else ("fabric",)
    for handle_type in wanted:
        if device.makes_handles(handle_type):
            return handle_type
    domain = (
        "an NVLink domain of several hosts, its IMEX service (nvidia-imex) running on each, and an "
        "IMEX channel (/dev/nvidia-caps-imex-channels) that this process may open"
    )
    if carries_fds:
        raise DwdpUnsupportedError(
            f"CUDA device {device.ordinal} makes no memory that another process can map: neither as a "
            "file descriptor (virtual GPUs and WSL make none) nor as a fabric handle, which needs "
            f'{domain}. Run on the bare GPU or set up IMEX, or use dwdp mode "replica".'
        )
    raise DwdpUnsupportedError(
        f"CUDA device {device.ordinal} makes no fabric memory handles, which ranks on several hosts "
        f"(tcp://) need: {domain}. Use unix:///folder for the ranks of one host."
    )

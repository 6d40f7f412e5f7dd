"""Memory of the host device: shards of this rank, of its peers, and slots, each a memfd.

Nothing here has a name on the file system, so nothing can be truncated under a reader (SIGBUS) or be
left behind. Each object owns its descriptor and mappings, and is closed by whichever made it.

Sources: memfd_create(2), fcntl(2) F_ADD_SEALS.
"""

import fcntl
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from vllm_dwdp.device.base import Handles
from vllm_dwdp.device.digest import digest_host_memory
from vllm_dwdp.device.limits import check_available
from vllm_dwdp.device.pages import Mapping, map_pages
from vllm_dwdp.errors import DwdpMemoryError
from vllm_dwdp.logger import format_gib

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class HostShard:
    """This rank's experts in a memfd that grows layer by layer and is then sealed.

    `close` releases the fd and the writable mappings; peers that mapped the memory keep it.
    """

    is_adopted = False

    def __init__(self, name: str) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.num_bytes = 0
        self._writable: list[Mapping] = []

    def append(self, piece_bytes: Sequence[int]) -> Mapping:
        """Grow by these bytes (page-aligned, zeroed) and return the new part, writable.

        Raises:
            DwdpMemoryError: the host or the container has too little memory for it.
        """
        num_bytes = sum(piece_bytes)
        if not num_bytes:
            return Mapping(0, 0)
        check_available(num_bytes, "the next layer of this rank's expert shard")
        try:
            os.posix_fallocate(self.fd, self.num_bytes, num_bytes)
        except OSError as error:
            raise DwdpMemoryError(
                f"reserving {format_gib(num_bytes)} of shared memory failed: {error}. "
                "Free memory on this host, raise the container's limit, or use more ranks."
            ) from error
        mapping = map_pages(self.fd, self.num_bytes, num_bytes, writable=True)
        self._writable.append(mapping)
        self.num_bytes += num_bytes
        return mapping

    def seal(self) -> None:
        """Fix the shard's size, and what peers get is to read: none of them can map it writable."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)

    def digest(self) -> bytes:
        """As `device.digest` says, by as many threads as there are cores."""
        whole = map_pages(self.fd, 0, self.num_bytes, writable=False)
        try:
            return digest_host_memory(whole.address, whole.num_bytes)
        finally:
            whole.unmap()

    def finish(self) -> None:
        """Drop our own writable mappings: the content is final."""
        while self._writable:
            self._writable.pop().unmap()

    def map_writable(self) -> Mapping:
        """As `Shard.map_writable`."""
        return map_pages(self.fd, 0, self.num_bytes, writable=True)

    def export(self) -> Handles:
        """One read-only fd of the whole shard."""
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        return Handles(fds=(fd,), num_bytes=(self.num_bytes,))

    def close(self) -> None:
        """Release the mappings and the fd."""
        self.finish()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class AdoptedShard:
    """A sealed shard of an earlier start of this rank, with the face of `HostShard`.

    The content is there already and whole; `append` hands out its parts in order, read-only. Its memory
    is this rank's own, so `map_writable` opens it anew, to write. Owns
    `fd` once it is made.

    Raises:
        DwdpMemoryError: it cannot be mapped.
    """

    is_adopted = True

    def __init__(self, fd: int, capacity_bytes: int) -> None:
        self.fd = fd
        self.num_bytes = 0
        self._capacity_bytes = capacity_bytes
        self._whole = map_pages(fd, 0, capacity_bytes, writable=False)

    def append(self, piece_bytes: Sequence[int]) -> Mapping:
        """Return the next bytes of the whole.

        Raises:
            DwdpMemoryError: they end behind it.
        """
        num_bytes = sum(piece_bytes)
        part = Mapping(self._whole.address + self.num_bytes, num_bytes)
        self.num_bytes += num_bytes
        if self.num_bytes > self._capacity_bytes:
            raise DwdpMemoryError(
                f"the shard that a peer kept for this rank has {self._capacity_bytes} bytes, but "
                f"this model needs more. Restart all ranks of the group."
            )
        return part

    def digest(self) -> bytes:
        """As `HostShard.digest`."""
        return digest_host_memory(self._whole.address, self._whole.num_bytes)

    def seal(self) -> None:
        """Finish the sealed whole; all of it must have been handed out.

        Raises:
            DwdpMemoryError: the layout of the model does not fit it.
        """
        if self.num_bytes != self._capacity_bytes:
            raise DwdpMemoryError(
                f"the shard that a peer kept for this rank has {self._capacity_bytes} bytes, but "
                f"this model needs {self.num_bytes}. Restart all ranks of the group."
            )

    def finish(self) -> None:
        """Drop the mapping of the whole; composites have their own."""
        if self._whole.num_bytes:
            self._whole.unmap()
            self._whole = Mapping(0, 0)

    def map_writable(self) -> Mapping:
        """As `Shard.map_writable`."""
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DwdpMemoryError(
                f"the experts that this rank adopted cannot be opened to write new ones: {error}. "
                "Restart all ranks of the group with the new weights."
            ) from error
        try:
            return map_pages(fd, 0, self.num_bytes, writable=True)
        finally:
            os.close(fd)

    def export(self) -> Handles:
        """As `HostShard.export`."""
        return Handles(fds=(os.dup(self.fd),), num_bytes=(self.num_bytes,))

    def close(self) -> None:
        """Release the mapping and the fd."""
        self.finish()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class HostPeer:
    """A peer's shard, mapped whole. Owns `fd` once it is made."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        self.fd = fd
        self._view = map_pages(fd, 0, num_bytes, writable=False)
        self.address = self._view.address

    def digest(self) -> bytes:
        """As `HostShard.digest`."""
        return digest_host_memory(self._view.address, self._view.num_bytes)

    def close(self) -> None:
        """Unmap it and close the fd."""
        self._view.unmap()
        os.close(self.fd)


class HostSlots:
    """Equal pieces of one private memfd."""

    def __init__(self, num_bytes: int) -> None:
        check_available(num_bytes, "the prefetch slots")
        with ExitStack() as undo:
            self.fd = os.memfd_create("dwdp-slots", os.MFD_CLOEXEC)
            undo.callback(os.close, self.fd)
            if num_bytes:
                os.posix_fallocate(self.fd, 0, num_bytes)
            undo.pop_all()

    def close(self) -> None:
        """Release the memory."""
        os.close(self.fd)


def sealed_file(handles: Handles) -> tuple[int, int]:
    """Return the descriptor of a shard and its bytes.

    Raises:
        DwdpMemoryError: it is no memfd of that size which can no longer be resized.
    """
    num_bytes = sum(handles.num_bytes)
    seals, size = 0, 0
    if len(handles.fds) == 1:
        size = os.fstat(handles.fds[0]).st_size
        with suppress(OSError):  # EINVAL: no memfd
            seals = fcntl.fcntl(handles.fds[0], fcntl.F_GET_SEALS)
    if size != num_bytes or seals & _SEALS != _SEALS:
        raise DwdpMemoryError(
            f"a shard of {num_bytes} bytes came as {len(handles.fds)} descriptors of {size} bytes with "
            f"seals {seals:#x}; one sealed memfd of that size is required. Start every rank with the "
            "same version, and see which other program listens at the rendezvous."
        )
    return handles.fds[0], num_bytes

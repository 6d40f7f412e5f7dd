"""Host memory: sealed memfd shards, peer views and composite tensors by mmap.

Owns the file descriptors and address ranges of one rank's expert memory. Nothing here has a name
on the file system, so nothing can be truncated under a reader (SIGBUS) or be left behind. Runs in
the worker's main thread, at load time only.

Sources: memfd_create(2), fcntl(2) F_ADD_SEALS, mmap(2) MAP_FIXED.
"""

import ctypes
import fcntl
import hashlib
import mmap
import os
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import psutil

from vllm_dwdp.errors import DwdpMemoryError
from vllm_dwdp.logger import format_gib
from vllm_dwdp.memory.layout import ByteRange

PAGE_BYTES = mmap.PAGESIZE
DIGEST_PIECE_BYTES = 16 * 2**20

_SEALS = (
    fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x0010  # F_SEAL_FUTURE_WRITE (Linux 5.1)
)
_MAP_FAILED = ctypes.c_void_p(-1).value
_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True)
class Mapping:
    """An address range of this process. Whoever made it calls `unmap` once.

    Args:
        address: first byte.
        num_bytes: length, a multiple of the page size.
    """

    address: int
    num_bytes: int

    def unmap(self) -> None:
        """Give the range back. Tensors over it must be gone."""
        if _libc.munmap(self.address, self.num_bytes):
            _raise_errno(f"munmap of {self.num_bytes} bytes at {self.address:#x}")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One piece of a composite tensor: `span` of it is backed by `fd` from `offset` on."""

    span: ByteRange
    fd: int
    offset: int


def map_pages(fd: int, offset: int, num_bytes: int, *, writable: bool) -> Mapping:
    """Map `num_bytes` of `fd`, shared; the fd may be closed afterwards.

    Raises:
        DwdpMemoryError: the kernel refuses (`vm.max_map_count`, a sealed fd, no address space).
    """
    return Mapping(_mmap(0, num_bytes, fd, offset, writable=writable, flags=0), num_bytes)


def map_composite(segments: Sequence[Segment], num_bytes: int) -> Mapping:
    """Assemble a read-only address range from pages of several files.

    Args:
        segments: page-aligned pieces that tile `[0, num_bytes)`.
        num_bytes: length of the range, page-aligned.

    Raises:
        DwdpMemoryError: a piece cannot be mapped; the whole range is given back.
    """
    address = _check_address(
        _libc.mmap(
            None,
            num_bytes,
            _PROT_NONE,
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
            -1,
            0,
        ),
        f"mmap of an address range of {format_gib(num_bytes)}",
    )
    reserved = Mapping(address, num_bytes)
    with ExitStack() as undo:
        undo.callback(reserved.unmap)
        for segment in segments:
            _mmap(
                address + segment.span.start,
                len(segment.span),
                segment.fd,
                segment.offset,
                writable=False,
                flags=_MAP_FIXED,
            )
        undo.pop_all()
    return reserved


class HostShard:
    """This rank's experts in a memfd that grows layer by layer and is then sealed.

    `close` releases the fd and the writable mappings; peers that mapped the memory keep it.
    """

    is_adopted = False

    def __init__(self, name: str) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.num_bytes = 0
        self._writable: list[Mapping] = []

    def append(self, num_bytes: int) -> Mapping:
        """Grow by `num_bytes` (page-aligned, zeroed) and return the new part, writable.

        The mapping is owned by the shard and lives until `finish`.

        Raises:
            DwdpMemoryError: the host has not enough free memory.
        """
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
        """From now on nobody can resize the shard or map it writable; we still may fill edges."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)

    def digest(self) -> bytes:
        """SHA-256 over the digests of its pieces of `DIGEST_PIECE_BYTES`, by several threads."""
        whole = map_pages(self.fd, 0, self.num_bytes, writable=False)
        try:
            return digest_of(whole)
        finally:
            whole.unmap()

    def finish(self) -> None:
        """Drop our own writable mappings: the content is final."""
        while self._writable:
            self._writable.pop().unmap()

    def open_readonly(self) -> int:
        """A read-only fd of the shard, owned by the caller, to be handed to peers."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Release the mappings and the fd."""
        self.finish()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class AdoptedShard:
    """A sealed shard of an earlier life of this rank, with the face of `HostShard`.

    The content is there already and whole; `append` hands out its parts in order, read-only. Owns
    `fd` from now on.

    Raises:
        DwdpMemoryError: it cannot be mapped.
    """

    is_adopted = True

    def __init__(self, fd: int, capacity_bytes: int) -> None:
        self.fd = fd
        self.num_bytes = 0
        self._capacity_bytes = capacity_bytes
        try:
            self._whole = map_pages(fd, 0, capacity_bytes, writable=False)
        except BaseException:
            os.close(fd)
            raise

    def append(self, num_bytes: int) -> Mapping:
        """The next `num_bytes`; owned by the shard until `finish`."""
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
        return digest_of(self._whole)

    def seal(self) -> None:
        """It is sealed; all of it must have been handed out.

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

    def open_readonly(self) -> int:
        """As `HostShard.open_readonly`."""
        return os.dup(self.fd)

    def close(self) -> None:
        """Release the mapping and the fd."""
        self.finish()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class HostSlots:
    """`num_slots` equal pieces of one private memfd, writable here, mapped into composites."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        check_available(num_slots * slot_bytes, f"{num_slots} prefetch slots")
        self.slot_bytes = slot_bytes
        with ExitStack() as undo:
            self.fd = os.memfd_create("dwdp-slots", os.MFD_CLOEXEC)
            undo.callback(os.close, self.fd)
            os.posix_fallocate(self.fd, 0, num_slots * slot_bytes)
            self.mapping = map_pages(self.fd, 0, num_slots * slot_bytes, writable=True)
            undo.pop_all()

    def address(self, slot: int, offset: int) -> int:
        """Writable address of byte `offset` of slot `slot`."""
        return self.mapping.address + self.file_offset(slot, offset)

    def file_offset(self, slot: int, offset: int) -> int:
        """Where that byte lies in `fd`."""
        return slot * self.slot_bytes + offset

    def close(self) -> None:
        """Release the memory; composites over it must be gone."""
        self.mapping.unmap()
        os.close(self.fd)


def digest_of(mapping: Mapping) -> bytes:
    """SHA-256 over the SHA-256 of each piece of the range."""

    def digest_piece(start: int) -> bytes:
        num_bytes = min(DIGEST_PIECE_BYTES, mapping.num_bytes - start)
        piece = (ctypes.c_char * num_bytes).from_address(mapping.address + start)
        return hashlib.sha256(piece).digest()

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        pieces = pool.map(digest_piece, range(0, mapping.num_bytes, DIGEST_PIECE_BYTES))
        return hashlib.sha256(b"".join(pieces)).digest()


def copy_bytes(destination: int, source: int, num_bytes: int) -> None:
    """Copy between two addresses of this process."""
    ctypes.memmove(destination, source, num_bytes)


def check_available(num_bytes: int, purpose: str) -> None:
    """Refuse before the kernel's out-of-memory killer does.

    Raises:
        DwdpMemoryError: less than `num_bytes` are available to this process.
    """
    available = available_bytes()
    if num_bytes > available:
        raise DwdpMemoryError(
            f"{purpose} needs {format_gib(num_bytes)} but only {format_gib(available)} of memory "
            "are available. Use more ranks per group, free memory on this host, or raise the "
            "container's memory limit."
        )


def check_open_files(num_files: int, purpose: str) -> None:
    """Refuse before a file descriptor runs out in the middle of a start or of serving.

    Raises:
        DwdpMemoryError: fewer than `num_files` more may be opened by this process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + num_files
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard == resource.RLIM_INFINITY or needed <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return
    raise DwdpMemoryError(
        f"RLIMIT_NOFILE is {soft} (hard limit {hard}), but {purpose} needs {needed} open files in "
        f"this process. Raise it, e.g. with `ulimit -n {max(65536, needed)}` or LimitNOFILE= of a "
        "systemd unit."
    )


def available_bytes() -> int:
    """Memory this process may still take: the host's, or the cgroup's when that is less."""
    available = int(psutil.virtual_memory().available)
    limit = _read_integer("/sys/fs/cgroup/memory.max")
    used = _read_integer("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def proportional_set_bytes(pid: int | str = "self") -> int:
    """Proportional set size: shared pages count once over all processes that map them."""
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        for line in rollup:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("smaps_rollup has no Pss line")


def release_free_heap() -> None:
    """Return what malloc keeps of freed weights to the kernel (glibc; elsewhere nothing)."""
    trim: Callable[[int], int] | None = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)


def _mmap(address: int, num_bytes: int, fd: int, offset: int, *, writable: bool, flags: int) -> int:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    result = _libc.mmap(address, num_bytes, protection, mmap.MAP_SHARED | flags, fd, offset)
    return _check_address(result, f"mmap of {format_gib(num_bytes)} of shared expert memory")


def _check_address(address: int | None, action: str) -> int:
    if address is None or address == _MAP_FAILED:
        _raise_errno(action)
    assert address is not None
    return address


def _raise_errno(action: str) -> None:
    code = ctypes.get_errno()
    raise DwdpMemoryError(
        f"{action} failed: {os.strerror(code)} (errno {code}). If it says 'Cannot allocate memory', "
        "raise the sysctl vm.max_map_count."
    )


def _read_integer(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return None

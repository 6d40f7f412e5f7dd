"""Real memfds, seals and mappings; whatever is made is given back."""

import ctypes
import mmap
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_dwdp.device import host, limits, pages
from vllm_dwdp.device.base import Handles, Segment
from vllm_dwdp.errors import DwdpMemoryError
from vllm_dwdp.layout.composite import ByteRange

PAGE = host.PAGE_BYTES


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    return len(re.findall(r"memfd:dwdp", Path("/proc/self/maps").read_text()))


def shard_with(content: bytes) -> host.HostShard:
    shard = host.HostShard("dwdp-test")
    mapping = shard.append([len(content)])
    ctypes.memmove(mapping.address, content, len(content))
    shard.seal()
    return shard


def test_a_sealed_shard_cannot_be_resized_or_written_by_a_peer() -> None:
    before = open_files(), mappings()
    shard = shard_with(b"a" * PAGE)
    (peer,) = shard.export().fds
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(shard.fd, 0)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(shard.fd, 2 * PAGE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(peer, b"b")
    with pytest.raises(PermissionError):
        mmap.mmap(peer, PAGE)
    os.close(peer)
    shard.close()
    shard.close()
    assert (open_files(), mappings()) == before


def test_the_owner_still_fills_its_edges_after_sealing() -> None:
    shard = host.HostShard("dwdp-test")
    mapping = shard.append([PAGE])
    shard.seal()
    ctypes.memset(mapping.address, 7, PAGE)
    shard.finish()
    assert os.pread(shard.fd, 1, PAGE - 1) == b"\x07"
    shard.close()


def test_the_owner_writes_new_weights_into_memory_that_peers_and_it_map_read_only() -> None:
    """Also an owner that adopted it: the descriptor that it was lent is open for reading only."""
    before = open_files(), mappings()
    shard = shard_with(b"1" * 2 * PAGE)
    shard.finish()
    device = host.HostDevice()
    peer = device.open_peer(shard.export())
    adopted = device.adopt_shard(shard.export())
    part = adopted.append([2 * PAGE])
    adopted.seal()
    for owner, value in ((shard, 2), (adopted, 3)):
        writable = owner.map_writable()
        ctypes.memset(writable.address, value, 2 * PAGE)
        writable.unmap()
        for address in (peer.address, part.address):
            assert ctypes.string_at(address, 2 * PAGE) == bytes([value]) * 2 * PAGE
    for mapped in (peer, adopted, shard):
        mapped.close()
    assert (open_files(), mappings()) == before


def test_a_composite_shows_pages_of_several_files_as_one_range() -> None:
    before = open_files(), mappings()
    first, second = shard_with(b"1" * 2 * PAGE), shard_with(b"2" * PAGE)
    segments = [
        Segment(span=ByteRange(0, PAGE), backing=first, offset=PAGE),
        Segment(span=ByteRange(PAGE, 2 * PAGE), backing=second, offset=0),
        Segment(span=ByteRange(2 * PAGE, 3 * PAGE), backing=first, offset=0),
    ]
    composite = pages.map_composite(segments, 3 * PAGE)
    assert ctypes.string_at(composite.address, 3 * PAGE) == b"1" * PAGE + b"2" * PAGE + b"1" * PAGE
    first.close()
    second.close()
    content = ctypes.string_at(composite.address, 3 * PAGE)
    assert content.count(b"1") == 2 * PAGE, "memory outlives its exporter while it is mapped"
    composite.unmap()
    assert (open_files(), mappings()) == before


def test_a_composite_that_cannot_be_finished_is_given_back() -> None:
    before = open_files(), mappings()
    shard = shard_with(b"1" * PAGE)
    segments = [
        Segment(span=ByteRange(0, PAGE), backing=shard, offset=0),
        Segment(span=ByteRange(PAGE, 2 * PAGE), backing=SimpleNamespace(fd=-1), offset=0),
    ]
    with pytest.raises(DwdpMemoryError, match=r"mmap of .* failed: Bad file descriptor"):
        pages.map_composite(segments, 2 * PAGE)
    assert mappings() == before[1] + 1, "only the shard itself"
    shard.close()
    assert (open_files(), mappings()) == before


def test_an_adopted_shard_is_the_same_memory_and_as_sealed() -> None:
    before = open_files(), mappings()
    first = shard_with(b"1" * 2 * PAGE + b"2" * PAGE)
    digest = first.digest()
    (fd,) = first.export().fds
    first.close()
    adopted = host.AdoptedShard(fd, 3 * PAGE)
    assert adopted.digest() == digest
    parts = [adopted.append([PAGE, PAGE]), adopted.append([PAGE])]
    assert ctypes.string_at(parts[1].address, PAGE) == b"2" * PAGE
    adopted.seal()
    with pytest.raises(PermissionError):
        mmap.mmap(adopted.fd, PAGE)
    adopted.close()
    assert (open_files(), mappings()) == before


def test_an_adopted_shard_must_fit_the_model() -> None:
    before = open_files(), mappings()
    for needed in (PAGE, 3 * PAGE):
        first = shard_with(b"1" * 2 * PAGE)
        adopted = host.AdoptedShard(first.export().fds[0], 2 * PAGE)
        with pytest.raises(DwdpMemoryError, match="kept for this rank has 8192 bytes"):
            fill(adopted, needed)
        adopted.close()
        first.close()
    assert (open_files(), mappings()) == before


def fill(shard: host.AdoptedShard, num_bytes: int) -> None:
    shard.append([num_bytes])
    shard.seal()


def test_one_flipped_byte_changes_the_digest() -> None:
    digests = set()
    for position in (None, 0, PAGE, 3 * PAGE - 1):
        content = bytearray(3 * PAGE)
        if position is not None:
            content[position] = 1
        shard = shard_with(bytes(content))
        digests.add(shard.digest())
        shard.close()
    assert len(digests) == 4


def test_slots_are_private_and_given_back() -> None:
    before = open_files(), mappings()
    slots = host.HostSlots(2 * PAGE)
    span = ByteRange(0, PAGE)
    segment = Segment(span=span, backing=slots, offset=PAGE, writable=True)
    composite = pages.map_composite([segment], PAGE)
    ctypes.memset(composite.address + 8, 9, 1)
    assert os.pread(slots.fd, 1, PAGE + 8) == b"\x09"
    slots.close()
    composite.unmap()
    assert (open_files(), mappings()) == before


def test_too_little_memory_names_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_bytes", lambda: 2**30)
    with pytest.raises(DwdpMemoryError, match=r"needs 2.00 GiB but only 1.00 GiB .*more ranks"):
        limits.check_available(2 * 2**30, "this rank's share of the experts")
    shard = host.HostShard("dwdp-test")
    with pytest.raises(DwdpMemoryError, match="the next layer of this rank's expert shard"):
        shard.append([2 * 2**30])
    shard.close()


def test_too_few_open_files_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(DwdpMemoryError, match=r"RLIMIT_NOFILE is 64 .*needs \d+ .*ulimit -n"):
        limits.check_open_files(1000, "a group of 72 ranks")


def test_proportional_memory_counts_a_shared_page_once() -> None:
    shard = shard_with(b"x" * (64 * PAGE))
    views = [pages.map_pages(shard.fd, 0, 64 * PAGE, writable=False) for _ in range(4)]
    for view in views:
        ctypes.string_at(view.address, 64 * PAGE)
    before = limits.proportional_set_bytes()
    for view in views[1:]:
        view.unmap()
    assert abs(limits.proportional_set_bytes() - before) < 64 * PAGE
    views[0].unmap()
    shard.close()


@pytest.mark.parametrize("flaw", ["not sealed", "another size", "no memfd", "two descriptors"])
def test_memory_that_its_maker_could_still_change_is_not_mapped(flaw: str, tmp_path: Path) -> None:
    """Shrinking it would be a SIGBUS for whoever reads it."""
    before = open_files()
    shard = shard_with(b"1" * PAGE)
    fds, num_bytes = (os.dup(shard.fd),), (PAGE,)
    if flaw == "not sealed":
        os.close(fds[0])
        fds = (os.memfd_create("unsealed"),)
        os.ftruncate(fds[0], PAGE)
    elif flaw == "another size":
        num_bytes = (2 * PAGE,)
    elif flaw == "no memfd":
        os.close(fds[0])
        (tmp_path / "file").write_bytes(bytes(PAGE))
        fds = (os.open(tmp_path / "file", os.O_RDONLY),)
    else:
        fds, num_bytes = (*fds, os.dup(fds[0])), (PAGE // 2, PAGE // 2)
    handles = Handles(fds=fds, num_bytes=num_bytes)
    device = host.HostDevice()
    for take in (device.open_peer, device.adopt_shard):
        with pytest.raises(DwdpMemoryError, match="one sealed memfd of that size is required"):
            take(handles)
    handles.close()
    shard.close()
    assert open_files() == before

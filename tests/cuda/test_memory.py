"""The CUDA device's memory: shards, peers, slots and composites."""

import ctypes
import logging
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import torch

from gpu_checks.driver_memory import PAGE
from gpu_checks.fake import fake_settings, live_objects
from tests.cuda.conftest import NOTHING
from vllm_dwdp.device.base import Handles, Segment
from vllm_dwdp.device.cuda import POOL_PAGE_BYTES, CudaMemory, CudaShard
from vllm_dwdp.device.cuda_driver import CudaDevice
from vllm_dwdp.device.digest import digest_host_memory
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.errors import DwdpMemoryError, DwdpUnsupportedError
from vllm_dwdp.layout.composite import ByteRange
from vllm_dwdp.layout.slots import SlotLayout


@contextmanager
def open_memory(**options: bool) -> Iterator[CudaMemory]:
    memory = CudaMemory(0, torch_device=torch.device("cpu"), clear_cache=lambda: None, **options)
    yield memory
    memory.close()


@pytest.fixture
def memory() -> Iterator[CudaMemory]:
    with open_memory() as memory:
        yield memory


def filled_shard(memory: CudaMemory, *pieces: int) -> CudaShard:
    """Return a shard whose pages are numbered from 1 on."""
    shard = memory.new_shard("test")
    mapping = shard.append(pieces)
    for page in range(sum(pieces) // PAGE):
        memory.device.write(mapping.address + page * PAGE, bytes([page + 1]) * PAGE)
    return shard


def pages_of(memory: CudaMemory, address: int, num_pages: int) -> list[int]:
    content = [memory.device.read(address + page * PAGE, PAGE) for page in range(num_pages)]
    assert all(page == page[:1] * PAGE for page in content), "a page is mixed"
    return [page[0] for page in content]


def test_a_composite_shows_pages_of_a_shard_a_peer_and_a_slot(memory: CudaMemory) -> None:
    shard, other = filled_shard(memory, PAGE, PAGE), filled_shard(memory, PAGE, 2 * PAGE)
    peer = memory.open_peer(other.export())
    assert pages_of(memory, peer.address, 3) == [1, 2, 3]
    layout = SlotLayout(
        num_pool_pages=1, num_pages=1, pool_page_bytes=POOL_PAGE_BYTES, page_bytes=PAGE
    )
    slots = memory.new_slots(2, layout)
    end = POOL_PAGE_BYTES
    second = layout.num_bytes
    segments = [
        Segment(span=ByteRange(end, end + 2 * PAGE), backing=peer, offset=PAGE),
        Segment(span=ByteRange(0, end), backing=slots, offset=second, writable=True),
        Segment(span=ByteRange(end + 2 * PAGE, end + 3 * PAGE), backing=shard, offset=PAGE),
    ]
    composite = memory.map_composite(segments, end + 3 * PAGE)
    memory.device.write(composite.address + end - 1, b"s")
    assert memory.device.read(composite.address + end - 1, 1) == b"s"
    assert pages_of(memory, composite.address + end, 3) == [2, 3, 2]
    tensor = tensor_at(composite.address + end, torch.uint8, (3, PAGE), memory.torch_device)
    assert tensor[:, 5].tolist() == [2, 3, 2]
    for owner in (shard, other, peer, slots):
        owner.close()
    assert pages_of(memory, composite.address + end, 3) == [2, 3, 2], "mappings hold the memory"
    composite.unmap()
    assert live_objects() == NOTHING


def test_a_shard_of_an_earlier_life_is_adopted(memory: CudaMemory) -> None:
    first = filled_shard(memory, PAGE, 2 * PAGE, PAGE)
    digest, handles = first.digest(), first.export()
    first.close()
    assert handles.num_bytes == memory.handle_bytes([PAGE, 2 * PAGE, PAGE])
    adopted = memory.adopt_shard(handles)
    assert adopted.is_adopted and adopted.digest() == digest
    parts = [adopted.append([PAGE]), adopted.append([2 * PAGE, PAGE]), adopted.append([])]
    adopted.seal()
    assert pages_of(memory, parts[1].address, 3) == [2, 3, 4]
    again = memory.adopt_shard(adopted.export())
    with pytest.raises(DwdpMemoryError, match=r"other pieces than this model needs.*Restart all"):
        again.append([2 * PAGE])
    again.append([PAGE])
    with pytest.raises(DwdpMemoryError, match="has 8388608 bytes, but this model needs 2097152"):
        again.seal()
    for shard in (adopted, again):
        shard.close()
        shard.close()
    assert live_objects() == NOTHING


def test_the_digest_is_that_of_host_memory_and_no_byte_is_read_back(
    memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = memory.new_shard("test")
    address = shard.append([PAGE, 2 * PAGE, PAGE]).address
    content = random.Random(0).randbytes(4 * PAGE)
    memory.device.write(address, content)
    expected = digest_host_memory(address_of(content), len(content))
    peer = memory.open_peer(shard.export())
    monkeypatch.setattr(CudaDevice, "read", None)
    assert shard.digest() == expected == peer.digest()
    nothing = memory.new_shard("empty")
    assert nothing.digest() == digest_host_memory(0, 0)
    for owner in (nothing, peer, shard):
        owner.close()


def address_of(content: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(content), ctypes.c_void_p).value or 0


def test_one_changed_byte_changes_the_digest(memory: CudaMemory) -> None:
    shard = memory.new_shard("test")
    mapping = shard.append([PAGE, PAGE])
    digests = {shard.digest()}
    for position in (0, PAGE, 2 * PAGE - 1):
        memory.device.write(mapping.address + position, b"x")
        digests.add(shard.digest())
    assert len(digests) == 4
    shard.close()


def test_what_fails_halfway_is_given_back(memory: CudaMemory) -> None:
    shard = filled_shard(memory, PAGE)
    held = live_objects()
    nonsense = Handles(fds=(os.open("/dev/null", os.O_RDONLY),), num_bytes=(PAGE,))
    with pytest.raises(DwdpMemoryError, match="importing device memory from file descriptor"):
        memory.open_peer(nonsense)
    short = Handles(fds=shard.export().fds, num_bytes=(PAGE, PAGE))
    with pytest.raises(DwdpMemoryError, match="a shard of 2 pieces came with 1 handles"):
        memory.open_peer(short)
    for handles in (nonsense, short):
        handles.close()
    wrong = memory.device.create(PAGE, handle_type="none")
    memory.device.release(wrong)
    good = next(iter(shard.allocations))
    with pytest.raises(DwdpMemoryError, match="mapping device memory failed: cuMemMap"):
        memory.memory.map_range([good, type(good)(wrong, PAGE)], writable=True)
    assert live_objects() == held
    shard.close()
    assert live_objects() == NOTHING


def test_too_little_memory_names_what_is_needed_and_free(memory: CudaMemory) -> None:
    shard = memory.new_shard("test")
    needed = (
        r"this rank's experts need 0.06250 GiB more of device memory, of which 0.03125 GiB "
        r"are free: allocating .*CUDA_ERROR_OUT_OF_MEMORY.*Use more ranks"
    )
    with fake_settings(memory_mib=64), pytest.raises(DwdpMemoryError, match=needed):
        shard.append([16 * PAGE, 32 * PAGE])
    shard.close()
    assert live_objects() == NOTHING


@contextmanager
def warnings() -> Iterator[list[str]]:
    """Collect what is logged meanwhile."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.dwdp")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def test_a_driver_without_read_only_mappings_is_said_once(memory: CudaMemory) -> None:
    with warnings() as said, fake_settings(read_only=0):
        shard = filled_shard(memory, PAGE)
        peers = [memory.open_peer(shard.export()) for _ in range(2)]
        assert [pages_of(memory, peer.address, 1) for peer in peers] == [[1], [1]]
    assert len(said) == 1 and "maps no device memory read-only" in said[0]
    for owner in (*peers, shard):
        owner.close()


@contextmanager
def own_and_peer(memory: CudaMemory) -> Iterator[list[Segment]]:
    """Two own pages, numbered 1 and 2, before two of a peer's, numbered alike."""
    shard, other = filled_shard(memory, PAGE, PAGE), filled_shard(memory, PAGE, PAGE)
    peer = memory.open_peer(other.export())
    shard.finish()
    yield [
        Segment(span=ByteRange(0, 2 * PAGE), backing=shard, offset=0),
        Segment(span=ByteRange(2 * PAGE, 4 * PAGE), backing=peer, offset=0),
    ]
    for owner in (peer, other, shard):
        owner.close()


def is_writable(address: int) -> bool:
    """As the host protects the page; a write that the fake refuses would end its context."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions = line.split()[:2]
        start, stop = (int(bound, 16) for bound in span.split("-"))
        if start <= address < stop:
            return "w" in permissions
    raise AssertionError(f"{address:#x} is not mapped")


NO_READ_ONLY, ONE_BY_ONE = "maps no device memory read-only", "gets one call for each"


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, []),
        ({"read_only": 0}, [NO_READ_ONLY]),
        ({"mixed_access": 1}, [ONE_BY_ONE]),
        ({"mixed_access": 1, "read_only": 0}, [NO_READ_ONLY, ONE_BY_ONE]),
    ],
)
def test_access_that_is_refused_is_set_otherwise_and_no_protection_is_lost(
    memory: CudaMemory, settings: dict[str, int], warned: list[str]
) -> None:
    with warnings() as said, fake_settings(**settings), own_and_peer(memory) as segments:
        composites = [memory.map_composite(segments, 4 * PAGE) for _ in range(2)]
        for composite in composites:
            assert pages_of(memory, composite.address, 4) == [1, 2, 1, 2]
            for page in range(4):
                assert is_writable(composite.address + page * PAGE) == ("read_only" in settings)
            composite.unmap()
    assert len(said) == len(warned)
    assert all(phrase in line for phrase, line in zip(warned, said, strict=True)), said


@pytest.mark.parametrize("read_only", [0, 1])
def test_no_access_to_peers_beside_own_memory_is_an_error_that_leaves_nothing(
    memory: CudaMemory, read_only: int
) -> None:
    with fake_settings(mixed_access=0, read_only=read_only), own_and_peer(memory) as segments:
        held, mapped = live_objects(), memory.mapping_counts()
        with pytest.raises(
            DwdpMemoryError, match=r"no range over 4 .*peers' memory, neither .*: set"
        ):
            memory.map_composite(segments, 4 * PAGE)
        assert live_objects() == held and memory.mapping_counts() == mapped
        own = memory.map_composite(segments[:1], 2 * PAGE)
        assert pages_of(memory, own.address, 2) == [1, 2], "own memory is as accessible as ever"
        own.unmap()


def test_mappings_are_counted_and_end_with_a_sentence_that_names_the_way_out(
    memory: CudaMemory,
) -> None:
    with own_and_peer(memory) as segments:
        before = memory.mapping_counts()
        assert before == {"ranges": 2, "allocations": 4, "peer_allocations": 2}
        composite = memory.map_composite(segments, 4 * PAGE)
        counts = {"ranges": 3, "allocations": 8, "peer_allocations": 4}
        assert memory.mapping_counts() == counts
        held = live_objects()
        with (
            fake_settings(peer_mappings=5),
            pytest.raises(
                DwdpMemoryError,
                match=r'cuMemMap.*OUT_OF_MEMORY.*mapped 5 allocations already.*"prefetch".*fewer ranks',
            ),
        ):
            memory.map_composite(segments, 4 * PAGE)
        assert live_objects() == held and memory.mapping_counts() == counts
        with fake_settings(peer_mappings=4), closing(filled_shard(memory, PAGE)) as other:
            handles = other.export()
            with pytest.raises(DwdpMemoryError, match=r"mapped 4 allocations .*fewer ranks"):
                memory.open_peer(handles)
            handles.close()
        composite.unmap()
        assert memory.mapping_counts() == before


@pytest.mark.parametrize(
    ("settings", "on_this_host", "over_tcp"),
    [
        ({}, (True, False), None),
        ({"fabric": 1}, (True, True), (False, True)),
        ({"fabric": 1, "combined": 0}, (True, False), (False, True)),
        ({"fabric": 1, "posix": 0}, (False, True), (False, True)),
        ({"posix": 0}, None, None),
    ],
)
def test_a_shard_is_made_for_every_handle_that_works_here_and_can_travel(
    settings: dict[str, int],
    on_this_host: tuple[bool, bool] | None,
    over_tcp: tuple[bool, bool] | None,
) -> None:
    for carries_fds, expected in ((True, on_this_host), (False, over_tcp)):
        with fake_settings(**settings), ExitStack() as undo:
            if expected is None:
                named = "memory .* neither as a file descriptor .*IMEX" if carries_fds else "fabric"
                with pytest.raises(DwdpUnsupportedError, match=f"CUDA device 0 makes no {named}"):
                    undo.enter_context(open_memory(carries_fds=carries_fds))
                continue
            memory = undo.enter_context(open_memory(carries_fds=carries_fds))
            shard = filled_shard(memory, PAGE, 2 * PAGE)
            handles = shard.export()
            assert (len(handles.fds), len(handles.fabric)) == tuple(2 * has for has in expected)
            peer = memory.open_peer(handles)
            assert pages_of(memory, peer.address, 3) == [1, 2, 3]
            peer.close()
            shard.close()


def test_where_a_descriptor_cannot_be_imported_the_fabric_handle_is() -> None:
    with warnings() as said, fake_settings(fabric=1, posix=1), open_memory() as memory:
        shard = filled_shard(memory, PAGE, PAGE)
        peer = memory.open_peer(shard.export())
        assert pages_of(memory, peer.address, 2) == [1, 2]
        peer.close()
        shard.close()
    assert len(said) == 1 and "by its CUDA fabric handles" in said[0]
    with fake_settings(posix=1), open_memory() as memory:
        shard = filled_shard(memory, PAGE)
        handles = shard.export()
        with pytest.raises(DwdpMemoryError, match=r"from file descriptor .*NOT_SUPPORTED"):
            memory.open_peer(handles)
        handles.close()
        shard.close()


def test_pages_are_as_large_as_the_handles_need() -> None:
    with fake_settings(fabric=1, fabric_granularity_mib=4):
        with open_memory() as memory:
            assert memory.page_bytes == 2 * PAGE and memory.pool_page_bytes % memory.page_bytes == 0
            filled_shard(memory, 2 * PAGE).close()
        with open_memory() as memory, pytest.raises(DwdpMemoryError, match="INVALID_VALUE"):
            memory.new_shard("test").append([PAGE])
    with fake_settings(fabric_granularity_mib=4), open_memory() as memory:
        assert memory.page_bytes == PAGE, "no handle needs more"


def test_how_much_is_free_and_who_has_it(
    memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, total = memory.memory_info()
    shard = filled_shard(memory, PAGE)
    assert memory.memory_info() == (free - PAGE, total)
    shard.close()
    assert memory.memory_info() == (free, total)
    monkeypatch.setattr(
        torch.cuda, "list_gpu_processes", lambda device: "GPU:0\nprocess 7 uses 1 MB"
    )
    assert memory.users() == "GPU:0; process 7 uses 1 MB"

    def fail(device: object) -> str:
        raise RuntimeError("NVML: not permitted")

    monkeypatch.setattr(torch.cuda, "list_gpu_processes", fail)
    assert memory.users() == ""

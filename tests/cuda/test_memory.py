"""The CUDA device's memory: shards, peers, slots and composites."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from gpu_checks.driver_memory import PAGE
from gpu_checks.fake import fake_settings, live_objects
from tests.cuda.conftest import NOTHING
from vllm_dwdp.device.base import Handles, Segment
from vllm_dwdp.device.cuda import POOL_PAGE_BYTES, CudaMemory, CudaShard
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
    """A shard whose pages are numbered from 1 on."""
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


def test_a_driver_without_read_only_mappings_is_said_once(memory: CudaMemory) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.dwdp")
    logger.addHandler(handler)
    try:
        with fake_settings(read_only=0):
            shard = filled_shard(memory, PAGE)
            peers = [memory.open_peer(shard.export()) for _ in range(2)]
            assert [pages_of(memory, peer.address, 1) for peer in peers] == [[1], [1]]
    finally:
        logger.removeHandler(handler)
    assert len(said) == 1 and "maps no device memory read-only" in said[0]
    for owner in (*peers, shard):
        owner.close()


def test_a_shard_is_passed_by_fabric_handles() -> None:
    with fake_settings(fabric=1), open_memory(fabric=True) as memory:
        shard = filled_shard(memory, PAGE, 2 * PAGE)
        handles = shard.export()
        assert [len(name) for name in handles.fabric] == [64, 64] and not handles.fds
        peer = memory.open_peer(handles)
        assert pages_of(memory, peer.address, 3) == [1, 2, 3]
        for owner in (peer, shard):
            owner.close()
        assert live_objects() == NOTHING


def test_a_device_without_fabric_handles_is_refused() -> None:
    with (
        pytest.raises(DwdpUnsupportedError, match=r"CUDA device 0 makes no fabric .*IMEX"),
        open_memory(fabric=True),
    ):
        pass


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

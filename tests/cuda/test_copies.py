"""What a layer's copies cost: calls and nodes over the fake driver, which counts; and their flags."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import astuple

import pytest

from gpu_checks.compute_stream import ComputeStream, Graph
from gpu_checks.driver_memory import PAGE, mapped
from gpu_checks.expert_ranks import ExpertShape, local_ranks
from gpu_checks.fake import Counts, counts
from gpu_checks.simulated_cuda import SimulatedCudaMemory
from tests.cuda.conftest import is_older_driver
from tests.helpers.expert_shapes import R1_MOE_LAYERS, r1_nvfp4
from vllm_dwdp.device.cuda_copies import CudaCopyQueue
from vllm_dwdp.device.cuda_driver import CudaDevice
from vllm_dwdp.device.cuda_queue import CudaQueue
from vllm_dwdp.device.queue import Waves
from vllm_dwdp.errors import TransferError
from vllm_dwdp.model_executor import measure
from vllm_dwdp.prefetch.captured_ring import CapturedRing
from vllm_dwdp.prefetch.copy_plan import bytes_by_peer, plan_layer_copies
from vllm_dwdp.prefetch.ring import Ring

SMALLER = 1024
NUM_SLOTS = 2


class SmallR1:
    """DeepSeek-R1 in NVFP4 on four ranks, as rank 0 copies it, with bytes divided by `SMALLER`.

    Every layer has the same experts: peers' shards lie one after the other, then the slots.
    """

    def __init__(self, device: CudaDevice, address: int, num_layers: int) -> None:
        layer = r1_nvfp4(4, smaller=SMALLER)
        self.stream = ComputeStream()
        self.queue = CudaQueue(device, lambda: self.stream.handle)
        plan = plan_layer_copies(layer, 0, CudaQueue.slice_bytes // SMALLER)
        shard_bytes = sum(len(weight.shard_pages(1)) for weight in layer.weights)
        self.slots = [address + 4 * shard_bytes + 4 * shard_bytes * slot for slot in range(2)]
        tensors = [sum(w.num_bytes for w in layer.weights[:n]) for n in range(len(layer.weights))]
        self.num_bytes = sum(weight.num_bytes for weight in layer.weights)

        def waves(slot: int) -> Waves:
            return [
                [
                    (
                        self.slots[slot] + tensors[copy.weight] + copy.offset,
                        address + copy.peer_rank * shard_bytes + copy.source_offset,
                        copy.num_bytes,
                    )
                    for copy in wave
                ]
                for wave in plan
            ]

        self.ring = Ring(
            [waves(layer % NUM_SLOTS) for layer in range(num_layers)],
            [bytes_by_peer(plan)] * num_layers,
            self.queue,
            num_slots=NUM_SLOTS,
        )
        self.captured = CapturedRing(self.ring, self.queue)
        self.num_layers = num_layers

    def run(self) -> None:
        """One kernel a layer."""
        for layer in range(self.num_layers):
            self.captured.wait(layer)
            self.stream.copy(self.slots[0], self.slots[1], 0)
            self.captured.record(layer)

    def capture(self) -> Graph:
        """Capture the whole forward."""
        self.stream.begin_capture()
        self.captured.begin_capture()
        self.run()
        self.captured.end_capture()
        return self.stream.end_capture()

    def close(self) -> None:
        self.stream.synchronize()
        self.queue.close()
        self.stream.close()


@contextmanager
def small_r1(num_layers: int) -> Iterator[SmallR1]:
    with CudaDevice(0) as device, mapped(device, 64 * 2**20) as (address, _handles):
        model = SmallR1(device, address, num_layers)
        yield model
        model.close()


@contextmanager
def counted() -> Iterator[list[Counts]]:
    """Count what was asked of the driver meanwhile; nodes are those of the last graph."""
    before, after = counts(), list[Counts]()
    yield after
    now = counts()
    spent = [late - early for early, late in zip(astuple(before), astuple(now), strict=True)]
    after.append(Counts(*spent[:-1], now.graph_nodes))


def test_a_fill_of_deepseek_r1_is_48_calls_of_three_copies() -> None:
    with small_r1(4) as model:
        with counted() as found:
            model.queue.issue(model.ring.batches[0], None)
        model.queue.drain()
    calls = (0, 144, 0) if is_older_driver() else (48, 0, 144)
    assert (found[0].batch_calls, found[0].copies, found[0].batch_copies) == calls
    assert sum(calls[:2]) <= 400


def test_a_full_graph_of_deepseek_r1_has_fewer_than_a_thousand_nodes() -> None:
    """One for each run of bytes of the 56 layers that are fetched inside, whatever it was cut into."""
    with small_r1(R1_MOE_LAYERS) as model:
        graph = model.capture()
        assert counts().graph_nodes == 56 * 12 + R1_MOE_LAYERS <= 1000
        graph.close()


def test_a_cut_run_arrives_whole_in_graphs_and_out_of_them() -> None:
    """What graphs copy uncut is what was cut: bytes on both sides of every cut, and nothing else."""
    with CudaDevice(0) as device, mapped(device, PAGE) as (address, _handles):
        content = bytes(number % 251 for number in range(3000))
        device.write(address, content)
        target = address + PAGE // 2
        cuts = [(0, 700), (1500, 2200), (700, 1400), (2200, 2300), (1400, 1401)]
        waves = [[(target + start, address + start, stop - start)] for start, stop in cuts]
        waves.append([(target + 2300, address + 100, 200)])  # follows in the target only
        expected = content[:1401] + bytes(99) + content[1500:2300] + content[100:300] + bytes(500)
        with CudaCopyQueue(device) as queue, ComputeStream() as stream:
            batch = queue.add_batch(waves)
            device.write(target, bytes(3000))
            queue.issue(batch, None)
            queue.drain()
            assert device.read(target, 3000) == expected
            device.write(target, bytes(3000))
            stream.begin_capture()
            queue.capture_record(batch, stream.handle)
            queue.capture_fill(batch, batch, stream.handle)
            graph = stream.end_capture()
            assert counts().graph_nodes == 3
            graph.launch(stream)
            stream.synchronize()
            graph.close()
            assert device.read(target, 3000) == expected


@pytest.mark.skipif(is_older_driver(), reason="flags belong to the batch call")
def test_only_copies_from_elsewhere_ask_for_a_copy_engine() -> None:
    """From the same device the flag makes a newer driver many times slower; from a peer it is right."""
    with ExitStack() as stack:
        device = stack.enter_context(CudaDevice(0))
        peer = stack.enter_context(CudaDevice(1))
        own, _ = stack.enter_context(mapped(device, PAGE))
        _, exported = stack.enter_context(mapped(peer, PAGE))
        fd = peer.export_fd(exported[0])
        remote = stack.enter_context(mapped_import(device, fd))
        device.write(own, b"own " * 16)
        device.write(remote, b"peer" * 16)
        queue = stack.enter_context(CudaCopyQueue(device))
        assert queue.describe() == (
            "CUDA driver 13.0, a batch call a wave, overlap flag on 0 of 0 slices"
        )
        target = own + PAGE // 2
        mixed = queue.add_batch(
            [
                [(target, own, 64), (target + 64, remote, 64), (target + 128, own, 64)],
                [(target + 192, remote, 64)],
            ]
        )
        assert queue.describe().endswith("overlap flag on 2 of 4 slices")
        with counted() as found:
            queue.issue(mixed, None)
            queue.drain()
        assert (found[0].batch_copies, found[0].overlapping_copies) == (4, 2)
        parts = [device.read(target + 64 * part, 64)[:4] for part in range(4)]
        assert parts == [b"own ", b"peer", b"own ", b"peer"]


@contextmanager
def mapped_import(device: CudaDevice, fd: int) -> Iterator[int]:
    """Map another device's page that came as a descriptor, which is closed."""

    handle = device.import_fd(fd)
    os.close(fd)
    address = device.reserve(PAGE)
    device.map(address, PAGE, handle)
    device.release(handle)
    device.set_access(address, PAGE, writable=True)
    try:
        yield address
    finally:
        device.unmap(address, PAGE)
        device.free_address(address, PAGE)


def test_slices_are_the_devices_unless_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 16 and 8 MiB from the one peer: as the device cuts them, whole, or in the user's size."""
    monkeypatch.setattr(CudaQueue, "slice_bytes", 4 * 2**20)
    shape = ExpertShape(num_experts=8, hidden_size=1024, intermediate_size=1024, top_k=2)
    memory = SimulatedCudaMemory()
    with local_ranks(memory, shape, 2, 2) as ranks:
        for slice_bytes, expected in ((None, 6), (0, 2), (2 * 2**20, 12)):
            rings = ranks[0].rings(slice_bytes=slice_bytes)
            with counted() as found:
                rings.queue.issue(rings.rings[0].batches[0], None)
                rings.queue.drain()
            assert found[0].copies + found[0].batch_copies == expected
            rings.close()
    memory.close()


def test_what_was_measured_at_start_says_how_it_was_copied() -> None:
    shape = ExpertShape(num_experts=8, hidden_size=1024, intermediate_size=1024, top_k=2)
    memory = SimulatedCudaMemory()
    with closing(memory), local_ranks(memory, shape, 2, 2) as (rank, other):
        spans = {1: (rank.peers[1].address, rank.layout.shard_bytes(other.dwdp_rank))}
        said = str(measure.measure_speeds(memory, spans))
    assert "GB/s (CUDA driver 1" in said and "overlap flag on" in said


def test_issuing_into_a_capture_is_refused_in_our_words_and_spoils_nothing() -> None:
    with small_r1(4) as model:
        model.stream.begin_capture()
        batches = model.ring.batches
        model.queue.capture_record(batches[0])
        model.queue.capture_fill(batches[2], after=batches[0])
        with (
            counted() as found,
            pytest.raises(TransferError, match=r"part of a graph .* use capture_fill, or issue"),
        ):
            model.queue.issue(batches[3], batches[1])
        assert (found[0].batch_calls, found[0].copies) == (0, 0)
        model.stream.end_capture().close()
        model.queue.issue(batches[3], batches[1])
        model.queue.drain()

"""Rings, schedule, queue and graph seam together, over the fake driver, at random speed. NOT A GPU.

A layer's kernels are a copy from its slot to an output, on a stream of its own; slots are overwritten
with 0xff before each fill, and the fake delays every operation at random. A driver holds the host up
once its queues are full: here also after the first operation, so that everything runs when it is called.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest
import torch

from gpu_checks.compute_stream import ComputeStream, Graph
from gpu_checks.driver_memory import PAGE
from gpu_checks.fake import fake_settings
from vllm_dwdp.compat.worker.cuda_graphs import followed_by
from vllm_dwdp.device.cuda import CudaMemory
from vllm_dwdp.device.cuda_queue import CudaQueue
from vllm_dwdp.device.host_queue import POISON_ENV
from vllm_dwdp.prefetch.captured_ring import CapturedRing
from vllm_dwdp.prefetch.ring import Ring

pytestmark = pytest.mark.timeout(120)

NUM_LAYERS, NUM_SLOTS, NUM_BYTES = 7, 2, 4096


class Model:
    """Seven layers on one ring; what layer n reads must be n + 1 in every byte."""

    def __init__(self, stack: ExitStack) -> None:
        self.memory = CudaMemory(0, torch_device=torch.device("cpu"), clear_cache=lambda: None)
        stack.callback(self.memory.close)
        page = self.memory.memory.allocate(PAGE, "a page", shared=False)
        stack.callback(self.memory.device.release, page.handle)
        mapping = self.memory.memory.map_range([page], writable=True)
        stack.callback(mapping.unmap)
        self.sources, self.slots, self.outputs = (
            mapping.address + part * 64 * NUM_BYTES for part in range(3)
        )
        for layer in range(NUM_LAYERS):
            self.memory.device.write(self._at(self.sources, layer), self.content(layer))
        self.stream = stack.enter_context(ComputeStream())
        self.queue = CudaQueue(self.memory.device, lambda: self.stream.handle)
        stack.callback(self.queue.close)
        batches = [
            [[(self._at(self.slots, layer % NUM_SLOTS), self._at(self.sources, layer), NUM_BYTES)]]
            for layer in range(NUM_LAYERS)
        ]
        self.eager = Ring(batches, [{1: NUM_BYTES}] * NUM_LAYERS, self.queue, num_slots=NUM_SLOTS)
        self.ring = CapturedRing(self.eager, self.queue)
        stack.enter_context(followed_by([self.ring], FakeTorchGraph))
        self.graphs: dict[tuple[int, ...], FakeTorchGraph] = {}
        stack.callback(lambda: [graph.executable.close() for graph in self.graphs.values()])

    @staticmethod
    def _at(base: int, index: int) -> int:
        return base + index * NUM_BYTES

    @staticmethod
    def content(layer: int) -> bytes:
        return bytes([layer + 1]) * NUM_BYTES

    def run(self, layers: Sequence[int], *, wait: bool = True) -> None:
        for layer in layers:
            if wait:
                self.ring.wait(layer)
            slot = self._at(self.slots, layer % NUM_SLOTS)
            self.stream.copy(self._at(self.outputs, layer), slot, NUM_BYTES)
            self.ring.record(layer)

    def piece(self, layers: Sequence[int]) -> None:
        key = tuple(layers)
        if key not in self.graphs:
            graph = FakeTorchGraph(self.stream)
            graph.capture_begin()
            self.run(layers)
            graph.capture_end()
            self.graphs[key] = graph
        self.graphs[key].replay()

    def wrong(self, layers: Sequence[int]) -> list[int]:
        """Layers that read something else; forgets what was read."""
        self.stream.synchronize()
        read = {n: self.memory.device.read(self._at(self.outputs, n), NUM_BYTES) for n in layers}
        for layer in layers:
            self.memory.device.write(self._at(self.outputs, layer), bytes(NUM_BYTES))
        return [layer for layer, content in read.items() if content != self.content(layer)]


class FakeTorchGraph:
    """The part of `torch.cuda.CUDAGraph` that is wrapped, over the fake driver."""

    executable: Graph

    def __init__(self, stream: ComputeStream) -> None:
        self._stream = stream

    def capture_begin(self) -> None:
        self._stream.begin_capture()

    def capture_end(self) -> None:
        self.executable = self._stream.end_capture()

    def replay(self) -> None:
        self.executable.launch(self._stream)


EVERY = range(NUM_LAYERS)


@pytest.fixture(
    autouse=True,
    params=[
        {"max_delay_us": 300, "seed": 1},
        {"max_delay_us": 300, "seed": 2},
        {"max_delay_us": 100, "seed": 3, "queue_depth": 1},
        {"max_delay_us": 200, "seed": 4, "queue_depth": 3},
    ],
    ids=["late", "late in another way", "no queue", "a short queue"],
)
def provoked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Slots are poisoned, and every operation of the fake is late at random."""
    monkeypatch.setenv(POISON_ENV, "1")
    with fake_settings(**request.param):
        yield


def test_eager_piecewise_and_full_steps_read_their_own_layers() -> None:
    with ExitStack() as stack:
        model = Model(stack)
        for step in range(6):
            model.run(EVERY)
            assert not model.wrong(EVERY), f"eager {step}"
        for step in range(6):
            for layer in EVERY:
                model.piece([layer])
            assert not model.wrong(EVERY), f"piecewise {step}"
        for step in range(6):
            model.piece(EVERY)
            assert not model.wrong(EVERY), f"full {step}"


def test_steps_in_flight_and_mixed_kinds() -> None:
    """Several steps are enqueued before the first is done, of any kind, some cut short."""
    with ExitStack() as stack:
        model = Model(stack)
        for step in range(12):
            model.run(range(3))
            model.piece([3, 4])
            model.run(range(5, NUM_LAYERS))
            model.piece(EVERY)
            model.run(range(step % NUM_LAYERS))  # cut short
            for start in range(0, NUM_LAYERS, 2):
                model.piece(range(start, min(start + 2, NUM_LAYERS)))
            assert step % 4 != 3 or not model.wrong(EVERY), step
        counters = model.eager.counters()
        assert counters.fetched_bytes[1] == counters.fills * NUM_BYTES


def test_a_forward_that_was_cut_short_is_healed_behind_its_kernels() -> None:
    """Its last layer runs, late, and is never recorded."""
    with ExitStack() as stack:
        model = Model(stack)
        model.run(EVERY)
        assert not model.wrong(EVERY)
        model.run(range(2))
        model.ring.wait(2)
        for _ in range(60):  # slow kernels before those that read the slot
            model.stream.copy(model.outputs + NUM_LAYERS * NUM_BYTES, model.sources, NUM_BYTES)
        model.stream.copy(model._at(model.outputs, 2), model._at(model.slots, 0), NUM_BYTES)
        model.ring.begin_forward()
        assert model.eager.counters().repairs == 2
        assert not model.wrong(range(3)), "the repair has overwritten what they read"
        model.run(EVERY)
        assert not model.wrong(EVERY)


def test_breakable_graphs_read_their_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own capture: segments of one forward, with attention between them run by the host."""
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture

    with ExitStack() as stack:
        model = Model(stack)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeTorchGraph(model.stream))
        scratch = model.outputs + NUM_LAYERS * NUM_BYTES

        def attention() -> None:
            model.stream.copy(scratch, model.sources, NUM_BYTES)

        def capture(breaks_before: Sequence[int]) -> BreakableCUDAGraphCapture:
            with BreakableCUDAGraphCapture() as captured:
                for layer in EVERY:
                    if layer in breaks_before:
                        captured.add_eager(attention)
                    model.run([layer])
            for number, replay in enumerate(captured.segments):
                if isinstance(graph := getattr(replay, "__self__", None), FakeTorchGraph):
                    model.graphs[len(model.graphs), number] = graph
            assert captured.num_graphs == len(breaks_before) + 1
            return captured

        model.run(EVERY)  # as vLLM warms up
        every, some = capture(EVERY), capture([0, 3, 4])
        assert not model.wrong([]), "capturing enqueues nothing but the breaks"
        for step in range(6):
            every.replay()
            some.replay()
            if step % 2:
                model.run(range(step))  # cut short
                every.replay()
            assert not model.wrong(EVERY), step
        counters = model.eager.counters()
        assert counters.fetched_bytes[1] == counters.fills * NUM_BYTES


def test_without_the_wait_poison_is_read() -> None:
    with ExitStack() as stack:
        model = Model(stack)
        seen = 0
        for _ in range(10):
            model.run(EVERY, wait=False)
            seen += len(model.wrong(EVERY))
        assert seen, "the other tests cannot fail"

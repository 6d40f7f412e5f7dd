"""Layers in two slots on the bare copy queue, consumed by copies: the order of a ring without a model.

Slots are poisoned before each fill and copies are late, so that a layer that is read too early, or a
slot that is overwritten too early, shows in the bytes. External event nodes of graphs are here as well,
which the product does not use (`vllm_dwdp.prefetch.captured_ring` says why).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gpu_checks.compute_stream import ComputeStream, Graph
from gpu_checks.driver_memory import PAGE, mapped
from vllm_dwdp.device.cuda_driver import CudaCopyQueue, CudaDevice

NUM_LAYERS, NUM_SLOTS, LAYERS_PER_GRAPH = 6, 2, 2
SLOT_BYTES = 64 * 1024
POISON = b"\xff" * SLOT_BYTES

Step = Callable[[], None]


class CopyRing:
    """Six layers, and a stream whose kernels copy each layer from its slot to an output."""

    def __init__(
        self, device: CudaDevice, queue: CudaCopyQueue, stream: ComputeStream, address: int
    ) -> None:
        self.device, self.queue, self.stream = device, queue, stream
        self.sources = address
        self.slots = address + NUM_LAYERS * SLOT_BYTES
        self.outputs = self.slots + NUM_SLOTS * SLOT_BYTES
        self.batches = []
        self._graphs: list[Graph] = []
        for layer in range(NUM_LAYERS):
            device.write(self.sources + layer * SLOT_BYTES, self.expected(layer))
            half = SLOT_BYTES // 2
            source, slot = self.sources + layer * SLOT_BYTES, self.slot(layer)
            slices = [(slot, source, half), (slot + half, source + half, half)]
            self.batches.append(queue.add_batch(slices))
        device.write(self.slots, POISON * NUM_SLOTS)

    def close(self) -> None:
        """Wait for everything and destroy the graphs."""
        self.stream.synchronize()
        self.queue.drain()
        while self._graphs:
            self._graphs.pop().close()

    def slot(self, layer: int) -> int:
        """Return the address of a layer's slot."""
        return self.slots + layer % NUM_SLOTS * SLOT_BYTES

    @staticmethod
    def expected(layer: int) -> bytes:
        """Return a layer's bytes."""
        return bytes([layer + 1]) * SLOT_BYTES

    # --- one layer ---

    def start(self) -> None:
        """Fill both slots, as before the first step."""
        for batch in self.batches[:NUM_SLOTS]:
            self.queue.issue(batch, None)

    def refill(self, layer: int) -> None:
        """Issue what follows `layer` in its slot, also around the end of the step."""
        following = (layer + NUM_SLOTS) % NUM_LAYERS
        self.queue.issue(self.batches[following], self.batches[layer])

    def consume(self, layer: int) -> None:
        """Read the slot, as a layer's kernels would."""
        self.stream.copy(self.outputs + layer * SLOT_BYTES, self.slot(layer), SLOT_BYTES)

    # --- steps ---

    def eager_step(self, *, wait: bool = True, record: bool = True) -> None:
        """Run every layer; without waits or records the ring is broken."""
        for layer, batch in enumerate(self.batches):
            if wait:
                self.queue.wait(batch, self.stream.handle)
            self.consume(layer)
            if record:
                self.queue.record(batch, self.stream.handle)
            self.refill(layer)

    def piecewise_step(self, *, wait: bool = True) -> Step:
        """Capture graphs of two layers with external nodes; a step refills behind each of them."""
        pieces: list[tuple[Graph, range]] = []
        for start in range(0, NUM_LAYERS, LAYERS_PER_GRAPH):
            piece = range(start, start + LAYERS_PER_GRAPH)
            self.stream.begin_capture()
            for layer in piece:
                assert self.queue.is_capturing(self.stream.handle)
                if wait:
                    self.queue.wait_external(self.batches[layer], self.stream.handle)
                self.consume(layer)
                self.queue.record_external(self.batches[layer], self.stream.handle)
            pieces.append((self._end_capture(), piece))
            assert not self.queue.is_capturing(self.stream.handle)

        def step() -> None:
            for graph, piece in pieces:
                graph.launch(self.stream)
                for layer in piece:
                    self.refill(layer)

        return step

    def full_step(self) -> Step:
        """Capture a whole step: external waits for the first two layers, external records of the
        last two, all other copies inside."""
        queue, handle = self.queue, self.stream.handle
        self.stream.begin_capture()
        for layer, batch in enumerate(self.batches):
            if layer < NUM_SLOTS:
                queue.wait_external(batch, handle)
            else:
                queue.capture_fill(batch, self.batches[layer - NUM_SLOTS], handle)
            self.consume(layer)
            if layer < NUM_LAYERS - NUM_SLOTS:
                queue.capture_record(batch, handle)
            else:
                queue.record_external(batch, handle)
        graph = self._end_capture()

        def step() -> None:
            graph.launch(self.stream)
            for layer in range(NUM_LAYERS - NUM_SLOTS, NUM_LAYERS):
                self.refill(layer)

        return step

    def _end_capture(self) -> Graph:
        self._graphs.append(self.stream.end_capture())
        return self._graphs[-1]

    # --- what was read ---

    def wrong_layers(
        self, steps: Sequence[Step], rounds: int, *, at_once: bool = False
    ) -> set[int]:
        """Run steps one by one, or all rounds back to back; the layers that read anything else.

        Args:
            steps: of one round.
            at_once: the host runs ahead of the device by all of them.
        """
        wrong: set[int] = set()
        self._clear()
        for _ in range(rounds):
            for step in steps:
                step()
            if not at_once:
                wrong |= self._compare()
                self._clear()
        return wrong if not at_once else self._compare()

    def _clear(self) -> None:
        self.device.write(self.outputs, bytes(NUM_LAYERS * SLOT_BYTES))

    def _compare(self) -> set[int]:
        self.stream.synchronize()
        data = self.device.read(self.outputs, NUM_LAYERS * SLOT_BYTES)
        rows = [data[start : start + SLOT_BYTES] for start in range(0, len(data), SLOT_BYTES)]
        return {layer for layer, row in enumerate(rows) if row != self.expected(layer)}


@contextmanager
def copy_ring() -> Iterator[CopyRing]:
    """Make a ring on device 0, whose queue delays copies and poisons slots."""
    with (
        CudaDevice(0) as device,
        mapped(device, PAGE) as (address, _handles),
        CudaCopyQueue(device, poison=True, max_delay_us=1500, seed=3) as queue,
        ComputeStream() as stream,
    ):
        ring = CopyRing(device, queue, stream, address)
        yield ring
        ring.close()


def wrong_layers_of_graphs(kind: str, rounds: int = 6) -> set[int]:
    """Replay graphs with external event nodes, alone, back to back and between eager steps.

    Does not return where a graph and the fills issued behind it wait for each other.

    Args:
        kind: `piecewise` or `full`.
    """
    with copy_ring() as ring:
        replay = ring.piecewise_step() if kind == "piecewise" else ring.full_step()
        ring.start()
        wrong = ring.wrong_layers([replay], rounds)
        wrong |= ring.wrong_layers([replay] * 3, rounds)
        wrong |= ring.wrong_layers([replay, ring.eager_step], rounds, at_once=True)
    return wrong


def when_waits_look(rounds: int = 3) -> str:
    """Launch a graph behind slow work, then fill its slot anew: which fill does its node wait for?"""
    old, new = 0x11, 0x22
    seen = [_what_a_graph_reads(old, new) for _ in range(rounds)]
    if set(seen) == {old}:
        return "when the graph is launched: a later fill is not waited for"
    if set(seen) == {new}:
        return "when it runs: a fill that was issued after the launch is waited for"
    return f"neither: the graph read {[hex(value) for value in seen]}"


def _what_a_graph_reads(old: int, new: int) -> int:
    """Return what a graph reads that is launched before, and runs after, a fill is issued anew.

    ::

        compute   slow work of another queue, 50 ms | graph: wait for the fill, read its slot
        copies    old fill, done before the launch    <new fill, issued after the launch, 300 ms>
    """
    with (
        CudaDevice(0) as device,
        mapped(device, PAGE) as (start, _handles),
        CudaCopyQueue(device, poison=True, max_delay_us=20_000, seed=1) as queue,
        CudaCopyQueue(device, max_delay_us=20_000, seed=2) as slow,
        ComputeStream() as stream,
    ):
        size = SLOT_BYTES
        source, slot, output, scratch = (start + number * size for number in range(4))
        device.write(source, bytes([old]) * size)
        fill = queue.add_batch([(slot, source, size)])
        late = queue.add_batch([(scratch, source, size)])
        work = slow.add_batch([(scratch + size, source, size)])
        queue.issue(fill, None)
        queue.drain()
        device.write(source, bytes([new]) * size)
        stream.begin_capture()
        queue.wait_external(fill, stream.handle)
        stream.copy(output, slot, size)
        graph = stream.end_capture()
        for _ in range(5):  # about 50 ms
            slow.issue(work, None)
        slow.wait(work, stream.handle)
        graph.launch(stream)
        for _ in range(30):  # about 300 ms
            queue.issue(late, None)
        queue.issue(fill, None)
        stream.synchronize()
        read = set(device.read(output, size))
        queue.drain()
        graph.close()
        return read.pop() if len(read) == 1 else -1

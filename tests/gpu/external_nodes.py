"""External event nodes: what a graph that waits for, or records, a copy queue's events would do.

Nothing documents whether such a node looks at its event when its graph is launched or when it runs.
The product does not use them (`vllm_dwdp.prefetch.captured_ring` says why), so that every answer is a
fact, also none: where nodes look when they run, graphs and refills may wait for each other for ever.
Ask only in a process with a time limit. The fake driver can play both.
"""

import contextlib
from collections.abc import Iterator

from gpu_checks.fake_cuda import ComputeStream, Graph
from vllm_dwdp.device.cuda_driver import CudaCopyQueue, CudaDevice

PAGE = 2 * 2**20
NUM_LAYERS, LAYERS_PER_GRAPH, NUM_SLOTS = 6, 2, 2
SIZE = 64 * 1024
OLD, NEW = 0x11, 0x22


@contextlib.contextmanager
def memory(device: CudaDevice) -> Iterator[int]:
    """A page of the device."""
    address = device.reserve(PAGE)
    handle = device.create(PAGE, handle_type="none")
    try:
        device.map(address, PAGE, handle)
        device.set_access(address, PAGE, writable=True)
        try:
            yield address
        finally:
            device.unmap(address, PAGE)
    finally:
        device.release(handle)
        device.free_address(address, PAGE)


def when_waits_look(rounds: int = 3) -> str:
    """Launch a graph behind slow work, then fill its slot anew: which fill does its node wait for?"""
    seen = [_what_a_graph_reads() for _ in range(rounds)]
    if set(seen) == {OLD}:
        return "when the graph is launched: a later fill is not waited for"
    if set(seen) == {NEW}:
        return "when it runs: a fill that was issued after the launch is waited for"
    return f"neither: the graph read {[hex(value) for value in seen]}"


def _what_a_graph_reads() -> int:
    """What a graph reads that is launched before, and runs after, a fill is issued anew.

    ::

        compute   slow work of another queue, 50 ms | graph: wait for the fill, read its slot
        copies    old fill, done before the launch    <new fill, issued after the launch, 300 ms>
    """
    with (
        CudaDevice(0) as device,
        memory(device) as start,
        CudaCopyQueue(device, poison=True, max_delay_us=20_000, seed=1) as queue,
        CudaCopyQueue(device, max_delay_us=20_000, seed=2) as slow,
        ComputeStream() as stream,
    ):
        source, slot, output, scratch = (start + number * SIZE for number in range(4))
        device.write(source, bytes([OLD]) * SIZE)
        fill = queue.add_batch([(slot, source, SIZE)])
        late = queue.add_batch([(scratch, source, SIZE)])
        work = slow.add_batch([(scratch + SIZE, source, SIZE)])
        queue.issue(fill, None)
        queue.drain()
        device.write(source, bytes([NEW]) * SIZE)
        stream.begin_capture()
        queue.wait_external(fill, stream.handle)
        stream.copy(output, slot, SIZE)
        graph = stream.end_capture()
        for _ in range(5):  # about 50 ms
            slow.issue(work, None)
        slow.wait(work, stream.handle)
        graph.launch(stream)
        for _ in range(30):  # about 300 ms
            queue.issue(late, None)
        queue.issue(fill, None)
        stream.synchronize()
        read = set(device.read(output, SIZE))
        queue.drain()
        graph.close()
        return read.pop() if len(read) == 1 else -1


ExternalGraph = tuple[Graph, range]


class ExternalRing:
    """Layers in two slots, read by three graphs whose nodes wait and record; copies are the host's."""

    def __init__(self, device: CudaDevice, queue: CudaCopyQueue, start: int) -> None:
        self.device, self.queue = device, queue
        self.sources = start
        self.slots = start + NUM_LAYERS * SIZE
        self.outputs = self.slots + NUM_SLOTS * SIZE
        self.batches = []
        for layer in range(NUM_LAYERS):
            device.write(self.sources + layer * SIZE, bytes([layer + 1]) * SIZE)
            self.batches.append(
                queue.add_batch([(self.slot(layer), self.sources + layer * SIZE, SIZE)])
            )

    def slot(self, layer: int) -> int:
        return self.slots + layer % NUM_SLOTS * SIZE

    def capture(self, stream: ComputeStream, layers: range) -> ExternalGraph:
        stream.begin_capture()
        for layer in layers:
            self.queue.wait_external(self.batches[layer], stream.handle)
            stream.copy(self.outputs + layer * SIZE, self.slot(layer), SIZE)
            self.queue.record_external(self.batches[layer], stream.handle)
        return stream.end_capture(), layers

    def step(self, stream: ComputeStream, graphs: list[ExternalGraph]) -> None:
        """Launch each graph, then refill behind it what it consumes."""
        for graph, layers in graphs:
            graph.launch(stream)
            for layer in layers:
                following = self.batches[(layer + NUM_SLOTS) % NUM_LAYERS]
                self.queue.issue(following, self.batches[layer])

    def wrong_layers(self) -> list[int]:
        data = self.device.read(self.outputs, NUM_LAYERS * SIZE)
        return [
            layer
            for layer in range(NUM_LAYERS)
            if data[layer * SIZE : (layer + 1) * SIZE] != bytes([layer + 1]) * SIZE
        ]


def wrong_layers_of_three_graphs(rounds: int = 6) -> list[int]:
    """Late copies, poisoned slots: layers whose graph read anything but their own bytes.

    Does not return where a graph and the fills issued behind it wait for each other.
    """
    wrong: set[int] = set()
    with (
        CudaDevice(0) as device,
        memory(device) as start,
        CudaCopyQueue(device, poison=True, max_delay_us=1500, seed=3) as queue,
        ComputeStream() as stream,
    ):
        ring = ExternalRing(device, queue, start)
        starts = range(0, NUM_LAYERS, LAYERS_PER_GRAPH)
        graphs = [ring.capture(stream, range(at, at + LAYERS_PER_GRAPH)) for at in starts]
        for slot in range(NUM_SLOTS):
            queue.issue(ring.batches[slot], None)
        for number in range(rounds):
            device.write(ring.outputs, bytes(NUM_LAYERS * SIZE))
            for _ in range(1 + number % 2 * 2):  # steps back to back as well
                ring.step(stream, graphs)
            stream.synchronize()
            wrong |= set(ring.wrong_layers())
        queue.drain()
        for graph, _layers in graphs:
            graph.close()
    return sorted(wrong)

"""Layers in two slots on the bare copy queue, consumed by copies: the order of a ring without a model.

Slots are poisoned before each fill and copies are late, so that a layer that is read too early, or a
slot that is overwritten too early, shows in the bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gpu_checks.compute_stream import ComputeStream, Graph
from gpu_checks.driver_memory import PAGE, mapped
from vllm_dwdp.device.cuda_copies import CudaCopyQueue
from vllm_dwdp.device.cuda_driver import CudaDevice

NUM_LAYERS, NUM_SLOTS = 6, 2
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
            waves = [[(slot, source, half)], [(slot + half, source + half, half)]]
            self.batches.append(queue.add_batch(waves))
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

    def full_step(self) -> Step:
        """Capture a whole step; the first layers are awaited before it, the last refilled behind it."""
        queue, stream = self.queue, self.stream
        stream.begin_capture()
        for layer, batch in enumerate(self.batches):
            if layer >= NUM_SLOTS:
                queue.capture_fill(batch, self.batches[layer - NUM_SLOTS], stream.handle)
            self.consume(layer)
            queue.capture_record(batch, stream.handle)
        graph = stream.end_capture()
        self._graphs.append(graph)

        def step() -> None:
            for batch in self.batches[:NUM_SLOTS]:
                queue.wait(batch, stream.handle)
            graph.launch(stream)
            for layer in range(NUM_LAYERS - NUM_SLOTS, NUM_LAYERS):
                queue.record(self.batches[layer], stream.handle)
                self.refill(layer)

        return step

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

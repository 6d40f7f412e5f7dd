"""A device that runs nothing and knows what is ordered: one compute stream, one copy stream, graphs.

A copy and a layer's kernels are *uses* of a slot. What the device knows is which uses are ordered before
the end of each stream, before each event and before each node of a graph, as CUDA documents it. A write
must be ordered after the last write and the last read of its slot, a read after the last write, and that
must be its own layer's: then no speed of any stream can make it wrong. Earlier uses are ordered before
these, or they would have been found out; so two uses of each slot are all that must be remembered, and
what a device can know is finite. `tests.unit.prefetch.test_every_order` walks all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_dwdp.device.queue import Waves
from vllm_dwdp.errors import TransferError
from vllm_dwdp.prefetch.captured_ring import CapturedRing, RingGraph
from vllm_dwdp.prefetch.ring import Ring


class Broken(Exception):
    """Something is not ordered that must be."""


@dataclass
class Node:
    """A captured use of a slot, and the nodes that it comes after."""

    kind: str
    batch: int
    after: set[int]


COMPUTE, COPY = 0, 1
TORN = -1
"""In place of a batch: some of its copies were enqueued, and then the driver refused one."""


@dataclass
class OrderedDevice:
    """Implements `device.queue.GraphQueue`.

    Args:
        num_batches: one for each layer.
        num_slots: batch `n` writes slot `n % num_slots`.
        holds: by slot, the batch that was written last.
        is_read: by slot, whether that was read.
        known: bit sets of uses that are ordered before the end of the compute stream, that of the copy
            stream, and the two events of each batch. Bit `2 * slot` is the last write, the next one the
            last read since.
    """

    num_batches: int
    num_slots: int
    holds: list[int | None] = field(init=False)
    is_read: list[bool] = field(init=False)
    known: list[int] = field(init=False)
    graph: list[Node] | None = None

    def __post_init__(self) -> None:
        self.holds, self.is_read = [None] * self.num_slots, [False] * self.num_slots
        self.known = [0] * (2 + 2 * self.num_batches)
        self.marks: dict[int, set[int]] = {}
        self.front: set[int] = set()
        self.fails_in = 0
        """From now on so many fills: that one fails after some of its copies; 0: none does."""
        self._num_added = 0

    def ready(self, batch: int) -> int:
        """Index in `known` of the event after the batch's copies."""
        return 2 + 2 * batch

    def consumed(self, batch: int) -> int:
        """Index in `known` of the event after the kernels of the batch's layer."""
        return 3 + 2 * batch

    # --- uses ---

    def write(self, batch: int, before: int, others: list[int]) -> int:
        """Copy into the batch's slot; return what is ordered before whatever follows.

        Args:
            before: uses that are ordered before.
            others: what is known elsewhere, besides `known`.
        """
        slot = batch % self.num_slots
        if self.holds[slot] is not None and not before >> 2 * slot & 1:
            raise Broken(f"the copies of layer {batch} race with those of layer {self.holds[slot]}")
        if self.is_read[slot] and not before >> 2 * slot + 1 & 1:
            raise Broken(f"the copies of layer {batch} race with kernels")
        self.holds[slot], self.is_read[slot] = batch, False
        self._forget(3 << 2 * slot, others)
        return before & ~(3 << 2 * slot) | 1 << 2 * slot

    def read(self, batch: int, before: int, others: list[int]) -> int:
        """Run a layer's kernels, which read the batch's slot; otherwise as `write`."""
        slot = batch % self.num_slots
        if self.holds[slot] != batch:
            raise Broken(f"layer {batch} reads layer {self.holds[slot]}")
        if not before >> 2 * slot & 1:
            raise Broken(f"layer {batch} does not wait for its copies")
        self.is_read[slot] = True
        self._forget(2 << 2 * slot, others)
        return before | 2 << 2 * slot

    def _forget(self, uses: int, others: list[int]) -> None:
        """Reuse these bits for new uses, which nobody knows yet."""
        for knowledge in (self.known, others):
            for index, bits in enumerate(knowledge):
                knowledge[index] = bits & ~uses

    # --- the copy queue ---

    def add_batch(self, waves: Waves) -> int:
        self._num_added += 1
        return self._num_added - 1

    def issue(self, batch: int, after: int | None) -> None:
        assert self.graph is None, "a host copy while a graph is captured"
        slot = batch % self.num_slots
        if after is not None:
            recorded = self.known[self.consumed(after)]
            if self.is_read[slot] and not recorded >> 2 * slot + 1 & 1:
                raise Broken(
                    f"the fill of layer {batch} is enqueued before the record it waits for"
                )
            self.known[COPY] |= recorded
        after_copies = self.write(batch, self.known[COPY], [])
        self.known[COPY] = after_copies
        self.fails_in -= 1
        if self.fails_in == 0:
            self.holds[slot] = TORN
            raise TransferError("a copy was refused")
        self.known[self.ready(batch)] = after_copies

    def wait(self, batch: int) -> float:
        if self.holds[batch % self.num_slots] not in (batch, TORN):  # kernels must not read that
            raise Broken(f"a wait for layer {batch} is enqueued before its fill")
        self.known[COMPUTE] |= self.known[self.ready(batch)]
        return 0.0

    def record(self, batch: int) -> None:
        self.known[self.consumed(batch)] = self.known[COMPUTE]

    def drain(self) -> None:
        return

    def close(self) -> None:
        return

    busy_seconds = 0.0
    slice_bytes = 1

    def describe(self) -> str:
        return "one stream"

    # --- capture ---

    def is_capturing(self) -> bool:
        return self.graph is not None

    def node(self, kind: str, batch: int, after: set[int]) -> int:
        assert self.graph is not None
        self.graph.append(Node(kind, batch, set(after)))
        return len(self.graph) - 1

    def capture_record(self, batch: int) -> None:
        self.marks[batch] = set(self.front)

    def capture_fill(self, batch: int, after: int) -> None:
        self.front |= {self.node("write", batch, self.marks[after])}

    def begin_graph(self) -> None:
        self.graph, self.marks, self.front = [], {}, set()

    def end_graph(self) -> list[Node]:
        nodes, self.graph = self.graph, None
        assert nodes is not None
        return nodes

    # --- what a model does ---

    def kernels(self, batch: int) -> None:
        if self.graph is not None:
            self.front = {self.node("read", batch, self.front)}
        else:
            self.known[COMPUTE] = self.read(batch, self.known[COMPUTE], [])

    def launch(self, nodes: list[Node]) -> None:
        """Everything in the graph starts after the compute stream so far, which then follows it all."""
        reached = [self.known[COMPUTE]]  # before the launch, and of each node
        for node in nodes:
            before = reached[0]
            for index in node.after:
                before |= reached[1 + index]
            use = self.write if node.kind == "write" else self.read
            reached.append(use(node.batch, before, reached))
        for known in reached:
            self.known[COMPUTE] |= known


class Model:
    """Layers on one ring, run eagerly or through graphs of any cut."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int = 2,
        device: type[OrderedDevice] = OrderedDevice,
        ring: type[Ring] = Ring,
        captured_ring: type[CapturedRing] = CapturedRing,
    ) -> None:
        self.num_layers = num_layers
        self.device = device(num_layers, num_slots)
        batches = [[[(layer % num_slots, 0, 1)]] for layer in range(num_layers)]
        self.eager = ring(batches, [{1: 1}] * num_layers, self.device, num_slots=num_slots)
        self.ring = captured_ring(self.eager, self.device)
        self.graphs: dict[tuple[int, ...], tuple[list[Node], RingGraph]] = {}

    def run(self, layers: Sequence[int]) -> None:
        """Eagerly, or into the graph that is being captured."""
        for layer in layers:
            self.ring.wait(layer)
            self.device.kernels(layer)
            self.ring.record(layer)

    def graph_of(self, layers: tuple[int, ...]) -> tuple[list[Node], RingGraph]:
        """Return the graph, captured when it is first needed, after a capture that fails on the way."""
        if layers not in self.graphs:
            for part in (layers[:1], layers):
                self.device.begin_graph()
                self.ring.begin_capture()
                self.run(part)
                nodes = self.device.end_graph()
            self.graphs[layers] = (nodes, self.ring.end_capture())
        return self.graphs[layers]

    def piece(self, layers: tuple[int, ...]) -> None:
        """Replay the graph of these layers."""
        nodes, graph = self.graph_of(layers)
        self.ring.before_launch(graph)
        self.device.launch(nodes)
        self.ring.after_launch(graph)

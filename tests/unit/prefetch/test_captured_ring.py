"""Rings in eager steps, piecewise and full graphs, in any order: checked as a happens-before relation.

The simulated device executes nothing. Every copy and every layer's kernels become an operation that
knows which operations it is ordered after (stream order, events, graph dependencies). A read is right
if, of all writes to its slot, the last one ordered before it is its own layer's, and every other write
is ordered before that one or after the read: then no speed of any stream can make it wrong.
"""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dwdp.device.queue import Waves
from vllm_dwdp.prefetch.captured_ring import CapturedRing, RingGraph
from vllm_dwdp.prefetch.ring import Ring

NUM_SLOTS = 2


class Node:
    """A captured operation and the indices of the nodes that it comes after."""

    def __init__(self, kind: str, batch: int, after: set[int]) -> None:
        self.kind, self.batch, self.after = kind, batch, after


class OrderedDevice:
    """One compute stream, one copy stream, events and graphs, as CUDA documents them."""

    def __init__(self) -> None:
        self.before: list[int] = []  # of each operation, a bit set of those ordered before it
        self.label: list[tuple[str, int]] = []
        self.tail = {"compute": 0, "copy": 0}  # bit sets: what the next operation comes after
        self.ready: dict[int, int] = {}
        self.consumed: dict[int, int] = {}
        self.slot_of: list[int] = []
        self.graph: list[Node] | None = None
        self.marks: dict[int, set[int]] = {}
        self.front: set[int] = set()
        self.honours_after = True

    def add(self, label: tuple[str, int], after: int) -> int:
        """A new operation; returns it and all before it as a bit set."""
        self.before.append(after)
        self.label.append(label)
        return after | 1 << (len(self.label) - 1)

    # --- the copy queue ---

    def add_batch(self, waves: Waves) -> int:
        self.slot_of.append(waves[0][0][0])
        batch = len(self.slot_of) - 1
        self.ready[batch] = self.consumed[batch] = 0
        return batch

    def issue(self, batch: int, after: int | None) -> None:
        assert self.graph is None, "a host copy while a graph is captured"
        if after is not None and self.honours_after:
            self.tail["copy"] |= self.consumed[after]
        self.tail["copy"] = self.add(("write", batch), self.tail["copy"])
        self.ready[batch] = self.tail["copy"]

    def wait(self, batch: int) -> float:
        self.tail["compute"] |= self.ready[batch]
        return 0.0

    def record(self, batch: int) -> None:
        self.consumed[batch] = self.tail["compute"]

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

    # --- what a model does ---

    def kernels(self, batch: int) -> None:
        if self.graph is not None:
            self.front = {self.node("read", batch, self.front)}
        else:
            self.tail["compute"] = self.add(("read", batch), self.tail["compute"])

    def begin_graph(self) -> None:
        self.graph, self.marks, self.front = [], {}, set()

    def end_graph(self) -> list[Node]:
        nodes, self.graph = self.graph, None
        assert nodes is not None
        return nodes

    def launch(self, nodes: list[Node]) -> None:
        start = self.tail["compute"]
        done: list[int] = []
        for node in nodes:
            after = start
            for index in node.after:
                after |= done[index]
            done.append(self.add((node.kind, node.batch), after))
        for reached in done:
            self.tail["compute"] |= reached

    def check(self) -> None:
        """Every read saw its own layer, whatever the streams' speed."""
        writes = [n for n, (kind, _) in enumerate(self.label) if kind == "write"]
        for read, (kind, batch) in enumerate(self.label):
            if kind != "read":
                continue
            same_slot = [w for w in writes if self.slot_of[self.label[w][1]] == self.slot_of[batch]]
            earlier = [w for w in same_slot if self.before[read] >> w & 1]
            assert earlier, f"layer {batch} runs before its first fill"
            last = max(earlier, key=lambda w: sum(self.before[w] >> e & 1 for e in earlier))
            assert self.label[last][1] == batch, f"layer {batch} reads {self.label[last]}"
            for write in same_slot:
                ordered = write == last or self.before[last] >> write & 1
                assert ordered or self.before[write] >> read & 1, "a copy races with kernels"


class Model:
    """Layers on one ring, run eagerly or through graphs of any cut."""

    def __init__(self, num_layers: int) -> None:
        self.device = OrderedDevice()
        batches = [[[(layer % NUM_SLOTS, 0, 1)]] for layer in range(num_layers)]
        self.eager = Ring(batches, [{1: 1}] * num_layers, self.device, num_slots=NUM_SLOTS)
        self.ring = CapturedRing(self.eager, self.device)
        self.num_layers = num_layers
        self.graphs: dict[tuple[int, ...], tuple[list[Node], RingGraph]] = {}

    def run(self, layers: Sequence[int]) -> None:
        for layer in layers:
            self.ring.wait(layer)
            self.device.kernels(layer)
            self.ring.record(layer)

    def piece(self, layers: tuple[int, ...]) -> None:
        """Replay the graph of these layers; captured when it is first needed."""
        if layers not in self.graphs:
            self.device.begin_graph()
            self.ring.begin_capture()
            self.run(layers)
            self.graphs[layers] = (self.device.end_graph(), self.ring.end_capture())
        nodes, graph = self.graphs[layers]
        self.ring.before_launch(graph)
        self.device.launch(nodes)
        self.ring.after_launch(graph)


@settings(max_examples=150, deadline=None)
@given(num_layers=st.integers(1, 9), data=st.data())
def test_eager_piecewise_and_full_forwards_in_any_order(
    num_layers: int, data: st.DataObject
) -> None:
    model = Model(num_layers)
    for _ in range(data.draw(st.integers(1, 5))):
        cuts = data.draw(st.sets(st.integers(1, max(1, num_layers - 1)), max_size=num_layers))
        edges = [0, *sorted(cut for cut in cuts if cut < num_layers), num_layers]
        stop = data.draw(st.integers(1, len(edges) - 1))  # a forward may be cut short
        for start, end in list(pairwise(edges))[:stop]:
            layers = tuple(range(start, end))
            if data.draw(st.booleans()):
                model.piece(layers)
            else:
                model.run(layers)
    model.device.check()


@pytest.mark.parametrize("num_layers", [1, 2, 3, 8])
def test_a_full_graph_fetches_its_own_layers_and_the_host_only_wraps_around(
    num_layers: int,
) -> None:
    model = Model(num_layers)
    whole = tuple(range(num_layers))
    model.piece(whole)
    _, graph = model.graphs[whole]
    assert graph.needs == list(range(min(NUM_SLOTS, num_layers)))
    assert graph.fills == list(range(NUM_SLOTS, num_layers))
    heals, fills = model.eager.counters().heals, model.eager.counters().fills
    for _ in range(3):
        model.piece(whole)
    assert model.eager.counters().heals == heals, "the wrap-around was missing"
    sharing = [len(range(slot, num_layers, NUM_SLOTS)) for slot in range(NUM_SLOTS)]
    per_step = sum(count for count in sharing if count > 1)
    assert model.eager.counters().fills - fills == 3 * per_step
    model.device.check()


def test_in_piecewise_graphs_the_host_fetches_everything_and_no_piece_joins_a_copy() -> None:
    model = Model(6)
    for _ in range(3):
        for layer in range(6):
            model.piece((layer,))
    for nodes, graph in model.graphs.values():
        assert not graph.fills
        assert [node.kind for node in nodes] == ["read"]
    counters = model.eager.counters()
    assert (counters.heals, counters.first_fills) == (0, NUM_SLOTS)
    model.device.check()


def test_a_copy_that_does_not_wait_for_its_slot_is_noticed() -> None:
    model = Model(5)
    model.device.honours_after = False
    for _ in range(2):
        model.run(range(5))
    with pytest.raises(AssertionError, match="races with kernels"):
        model.device.check()

"""A prefetch ring whose layers may run inside captured graphs. Worker's main thread; CUDA only.

While a graph is captured nothing runs, so the schedule stands still, and the ring notes instead what
the graph will do to it. One rule serves piecewise and full graphs alike: a layer whose slot an earlier
layer of the *same* graph used is fetched inside the graph; any other is awaited before the launch, and
the slots that the graph leaves are refilled behind it, by the same calls as in eager mode.

::

    compute     wait 0 | graph of MoE 0 | record 0 .. attention .. wait 1 | graph of MoE 1 | record 1
    copies                                <fill 2, beside attention and the next graphs>

    compute     wait 0, 1 | MoE 0, MoE 1, MoE 2, ... one graph                     | record -2, -1
    copies                       <fill 2, a branch from the end of MoE 0 to the start of MoE 2>

In a graph, dependencies decide what overlaps, not the order of capture. Waits and records around a
graph are ordinary stream order. External event nodes inside it would free a slot a little earlier, but
a copy that takes no longer than a layer is hidden either way, and nothing documents whether such a
node looks at its event when it is launched or when it runs: in the latter case the refill behind a
graph, which records the event anew, would wait for the graph, and the graph for it.
"""

from dataclasses import dataclass, field

from vllm_dwdp.device.queue import GraphQueue
from vllm_dwdp.prefetch.ring import Ring


@dataclass
class RingGraph:
    """What one captured graph does to a ring.

    Args:
        needs: layers that it expects in their slots.
        fills: layers that it fetches itself.
        leaves: by slot, the layer that it consumed there last.
    """

    needs: list[int] = field(default_factory=list)
    fills: list[int] = field(default_factory=list)
    leaves: dict[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.needs)


class CapturedRing:
    """A ring, in and out of capture; the same three calls bracket every layer."""

    def __init__(self, ring: Ring, queue: GraphQueue) -> None:
        self._ring = ring
        self._queue = queue
        self._graph = RingGraph()

    def begin_forward(self) -> None:
        """Note that a forward starts; if it is captured, nothing may be issued."""
        if not self._queue.is_capturing():
            self._ring.begin_forward()

    def wait(self, layer_index: int) -> None:
        """Order the stream, or the graph, after the layer's arrival."""
        if not self._queue.is_capturing():
            self._ring.wait(layer_index)
            return
        batches, slot = self._ring.batches, self._ring.slot(layer_index)
        before = self._graph.leaves.get(slot)
        if before is None:
            assert all(self._ring.slot(layer) != slot for layer in self._graph.needs), (
                f"layer {layer_index} follows a layer in its slot that was never recorded"
            )
            self._graph.needs.append(layer_index)
        elif before != layer_index:
            self._queue.capture_fill(batches[layer_index], after=batches[before])
            self._graph.fills.append(layer_index)

    def record(self, layer_index: int) -> None:
        """Note that the layer's kernels are enqueued, or captured."""
        if not self._queue.is_capturing():
            self._ring.record(layer_index)
            return
        self._queue.capture_record(self._ring.batches[layer_index])
        self._graph.leaves[self._ring.slot(layer_index)] = layer_index

    def begin_capture(self) -> None:
        """Note that the capture of a graph begins."""
        self._graph = RingGraph()

    def end_capture(self) -> RingGraph:
        """Note that the capture ended, or failed; return what the graph will do."""
        graph, self._graph = self._graph, RingGraph()
        return graph

    def before_launch(self, graph: RingGraph) -> None:
        """Make the stream wait for what the graph needs."""
        self._ring.prepare(graph.needs)

    def after_launch(self, graph: RingGraph) -> None:
        """Refill the slots that the graph leaves, once it has run."""
        self._ring.graph_ran(graph.fills, sorted(graph.leaves.values()))

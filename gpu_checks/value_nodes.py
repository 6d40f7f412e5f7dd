"""The question whether graphs could hold waits for values in the place of copies.

Such a graph waits, layer by layer, until a word in memory says that the layer is there, and says so by
another word when its slot is free. All copies of a step are then batch calls of the host, issued before
the launch, and a graph of any model has four small nodes a layer::

    compute   graph: [ ready[0]? take it . kernels . free[0] ] [ ready[1]? ... ]
    copies    free[4]? take it . copies of 0 . ready[0] | free[5]? ... copies of 1 . ready[1] | ...

A word is 1 or 0, and the stream that waited for it clears it. The product does not do this; asked is
whether the order holds, whether copies run beside kernels, and what it costs the host.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from gpu_checks.accelerator import Accelerator, accelerator
from gpu_checks.compute_stream import BatchCopies, ComputeStream, Graph

NUM_LAYERS, NUM_SLOTS = 6, 2
ENOUGH_HIDDEN = 0.9
"""Of the shorter of compute and copies: with less, graphs that hold copies are not given up."""


class ValueRing:
    """Six layers in two slots; a kernel copies its layer's slot to an output.

    Args:
        slot_bytes: of a layer.
        pause_us: how long a layer's kernel spins before it reads.
    """

    def __init__(
        self, gpu: Accelerator, stream: ComputeStream, *, slot_bytes: int, pause_us: int = 0
    ) -> None:
        self._gpu, self._compute, self._pause_us = gpu, stream, pause_us
        self.copies = ComputeStream()
        self._source = gpu.pinned(NUM_LAYERS * slot_bytes).view(NUM_LAYERS, slot_bytes)
        self._slots = self._bytes(NUM_SLOTS, slot_bytes)
        self._outputs = self._bytes(NUM_LAYERS, slot_bytes)
        self._words = torch.zeros(2, NUM_LAYERS, dtype=torch.int32, device=gpu.device)
        self._words[1, -NUM_SLOTS:] = 1  # both slots are free
        for layer in range(NUM_LAYERS):
            self._source[layer] = layer + 1
        gpu.synchronize()
        self._fills = [
            BatchCopies(
                [(self._slots[layer % NUM_SLOTS].data_ptr(), row.data_ptr(), slot_bytes)],
                overlap=True,
            )
            for layer, row in enumerate(self._source)
        ]

    def _bytes(self, *shape: int) -> Any:
        return torch.zeros(*shape, dtype=torch.uint8, device=self._gpu.device)

    def _ready(self, layer: int) -> int:
        return int(self._words[0, layer].data_ptr())

    def _free(self, layer: int) -> int:
        return int(self._words[1, layer % NUM_LAYERS].data_ptr())

    def issue(self) -> None:
        """Enqueue the copies of a step, which wait for the graphs of it; so before their launch."""
        for layer, fill in enumerate(self._fills):
            before = self._free(layer - NUM_SLOTS)
            self.copies.wait_value(before, 1)
            self.copies.write_value(before, 0)
            self.copies.copy_batch(fill)
            self.copies.write_value(self._ready(layer), 1)

    def capture(self, *, wait: bool = True, copied: bool = True) -> Graph:
        """Capture a step.

        Args:
            wait: whether layers wait for their copies; the ring is broken otherwise.
            copied: whether there are copies at all.
        """
        self._compute.begin_capture(mode=2)
        for layer in range(NUM_LAYERS):
            if copied and wait:
                self._compute.wait_value(self._ready(layer), 1)
            if copied:
                self._compute.write_value(self._ready(layer), 0)
            self._gpu.pause(self._pause_us)
            slot, output = self._slots[layer % NUM_SLOTS], self._outputs[layer]
            self._compute.copy(output.data_ptr(), slot.data_ptr(), slot.numel())
            if copied:
                self._compute.write_value(self._free(layer), 1)
        return self._compute.end_capture()

    def wrong_layers(self, graph: Graph, rounds: int, *, at_once: int = 1) -> set[int]:
        """Run steps, `at_once` of them back to back; the layers that read another's bytes."""
        wrong: set[int] = set()
        for _ in range(rounds):
            self._outputs.zero_()
            self._gpu.synchronize()
            for _ in range(at_once):
                self.issue()
                graph.launch(self._compute)
            self.quiet()
            rows = enumerate(self._outputs)
            wrong |= {layer for layer, row in rows if not bool((row == layer + 1).all())}
        return wrong

    def quiet(self) -> None:
        """Block until nothing runs."""
        self._compute.synchronize()
        self.copies.synchronize()

    def close(self) -> None:
        """Finish and destroy the copy stream."""
        self.quiet()
        self.copies.close()


def value_nodes() -> str:
    """Run a ring of value nodes: its order, how much it hides, what it costs the host."""
    gpu = accelerator()
    slot_bytes, pause_us = (32 * 2**20, 600) if gpu.is_real else (64 * 1024, 0)
    rounds = 10 if gpu.is_real else 2
    with ExitStack() as stack:
        stack.callback(gpu.open_memory().close)
        stack.enter_context(gpu.on_stream())
        stream = stack.enter_context(ComputeStream(handle=gpu.current_stream()))
        ring = ValueRing(gpu, stream, slot_bytes=slot_bytes, pause_us=pause_us)
        stack.callback(ring.close)
        graph, alone = ring.capture(), ring.capture(copied=False)
        stack.callback(graph.close)
        stack.callback(alone.close)
        wrong = ring.wrong_layers(graph, rounds) | ring.wrong_layers(graph, rounds, at_once=3)
        issue_us, launch_us = [], []

        def step() -> None:
            issue_us.append(1e6 * _seconds(ring.issue))
            launch_us.append(1e6 * _seconds(lambda: graph.launch(stream)))
            ring.quiet()

        def compute_only() -> None:
            alone.launch(stream)
            ring.quiet()

        def copies_only() -> None:
            for fill in ring._fills:
                ring.copies.copy_batch(fill)
            ring.quiet()

        both, compute, copies = (
            statistics.median(_seconds(action) for _ in range(rounds))
            for action in (step, compute_only, copies_only)
        )
    hidden = (compute + copies - both) / min(compute, copies)
    return (
        f"{judge_values(wrong, hidden)}; a step {both * 1e3:.2f} ms, its kernels {compute * 1e3:.2f}, "
        f"its copies {copies * 1e3:.2f}; the host {statistics.median(issue_us):.0f} us to issue "
        f"{NUM_LAYERS} layers, {statistics.median(launch_us):.0f} us to launch"
    )


def judge_values(wrong: set[int], hidden: float) -> str:
    """Say whether value nodes could take the place of copies in graphs, where those cost too much."""
    if wrong:
        return f"not to be built: wrong layers {sorted(wrong)}"
    usable = "usable" if hidden >= ENOUGH_HIDDEN else "not to be built"
    return f"{usable}: every layer is right, {hidden:.0%} hidden (limit {ENOUGH_HIDDEN:.0%})"


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started

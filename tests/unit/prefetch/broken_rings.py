"""Rings and devices that are broken on purpose, to show that the walk finds what it is for."""

from tests.unit.prefetch.ordered_device import OrderedDevice
from vllm_dwdp.prefetch.captured_ring import CapturedRing, RingGraph
from vllm_dwdp.prefetch.ring import Ring


class NoWait(OrderedDevice):
    """Kernels do not wait for copies."""

    def wait(self, batch: int) -> float:
        return 0.0


class NoRecord(OrderedDevice):
    """Nothing says when kernels are done."""

    def record(self, batch: int) -> None:
        return


class NoAfter(OrderedDevice):
    """Copies do not wait for kernels."""

    def issue(self, batch: int, after: int | None) -> None:
        super().issue(batch, None)


class EarlyMark(OrderedDevice):
    """In a graph, a slot counts as consumed before the kernels that consume it."""

    def capture_record(self, batch: int) -> None:
        assert self.graph is not None
        self.marks[batch] = set(self.graph[-1].after)


class LateJoin(OrderedDevice):
    """In a graph, nothing waits for a fill."""

    def capture_fill(self, batch: int, after: int) -> None:
        self.node("write", batch, self.marks[after])


class FillBeforeRecord(Ring):
    """A slot is refilled before its layer is recorded."""

    def record(self, layer_index: int) -> None:
        self._fill(self._schedule.fills_at_record(layer_index))
        self._queue.record(self.batches[layer_index])


class WaitBeforeFill(Ring):
    """A layer that is missing is waited for before it is fetched."""

    def wait(self, layer_index: int) -> None:
        self._await(layer_index)
        self._fill(self._schedule.fills_at_wait(layer_index))


class RepairWithoutRecord(Ring):
    """A repair trusts the last record of the layer that a forward left behind."""

    def _fill(self, fills):  # type: ignore[no-untyped-def]
        for fill in fills:
            after = None if fill.after is None else self.batches[fill.after]
            self._schedule.begin_fill(fill)
            self._queue.issue(self.batches[fill.layer], after)
            self._schedule.end_fill(fill)


class EarlyNote(Ring):
    """A fill counts as made before its copies are enqueued."""

    def _fill(self, fills):  # type: ignore[no-untyped-def]
        for fill in fills:
            self._schedule.end_fill(fill)
        super()._fill(fills)


class RefillBeforeLaunch(CapturedRing):
    """The slots that a graph leaves are refilled before it is launched."""

    def before_launch(self, graph: RingGraph) -> None:
        super().before_launch(graph)
        super().after_launch(graph)

    def after_launch(self, graph: RingGraph) -> None:
        return


class ForgottenGraph(CapturedRing):
    """What a graph leaves in its slots is not noted."""

    def after_launch(self, graph: RingGraph) -> None:
        for layer in graph.needs:
            self._ring._queue.record(self._ring.batches[layer])

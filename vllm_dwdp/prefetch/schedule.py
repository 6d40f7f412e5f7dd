"""Which layer fills which slot, and when. Pure, and the only place that knows what a slot holds.

Layer `i` of a ring uses slot `i % num_slots`. A slot is free once the layer in it was recorded (its
kernels are done, or enqueued before the event that the copy waits for); the next layer of that slot
is then fetched at once, and after the last layer the first layer of the next step. With two slots:

::

    compute     | 0 | 1 | 2 | 3 |  sample, schedule  | 0 | 1 | ...
    slot 0      [ 0 ]<fill 2>[ 2 ]<fill 0 ..........>[ 0 ]
    slot 1          [ 1 ]<fill 3>[ 3 ]<fill 1 ..........>[ 1 ]
                  ^   ^
                  |   wait(1): returns when slot 1 holds layer 1
                  record(0): layer 0 is done, so slot 0 is filled with layer 2

What a slot holds is compared at every wait. So a forward that was cut short, a dummy or profiling run,
or a skipped layer costs one late fill and nothing else: a *repair*, which waits for all kernels so far.
A ring of no more layers than slots is filled once and never again. So a ring of one layer has one slot
(`ring_slots`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

NUM_SLOTS = 2
"""Slots of a ring: one layer computes while the next arrives."""


def ring_slots(num_layers: int) -> int:
    """Slots that a ring of `num_layers` needs."""
    return min(NUM_SLOTS, num_layers)


@dataclass(frozen=True)
class Fill:
    """A layer to fetch into its slot.

    Args:
        layer: index in the ring.
        after: the layer that the slot holds; the copies wait for its record. None if it holds nothing.
        is_repair: the forward is out of step. Nobody knows whether `after` was recorded since its
            kernels read the slot, so it must be recorded now; its own copies may still be on their way.
    """

    layer: int
    after: int | None
    is_repair: bool


@dataclass
class SlotSchedule:
    """The state of one ring.

    Args:
        num_layers: MoE layers of the ring, in the order in which they run.
        num_slots: slots, at least 1; of fewer than `ring_slots(num_layers)` no copy runs beside kernels.
    """

    num_layers: int
    num_slots: int = NUM_SLOTS
    _holds: list[int | None] = field(init=False)
    _following: list[int] = field(init=False)

    def __post_init__(self) -> None:
        assert self.num_layers >= 1 and self.num_slots >= 1
        self._holds = [None] * self.num_slots
        self._following = [
            layer + self.num_slots if layer + self.num_slots < self.num_layers else self.slot(layer)
            for layer in range(self.num_layers)
        ]

    @property
    def holds(self) -> tuple[int | None, ...]:
        """By slot, the layer that it holds or is being filled with: all that a ring remembers."""
        return tuple(self._holds)

    def slot(self, layer: int) -> int:
        """Return the slot that `layer` uses."""
        return layer % self.num_slots

    def forget(self) -> None:
        """Forget what the slots hold, which is out of date; no copy is under way."""
        self._holds = [None] * self.num_slots

    def fills_at_begin(self) -> Sequence[Fill]:
        """Layers to fetch when a forward begins: the first ones, where the slots lack them.

        Only after a forward that was cut short, or the very first.
        """
        return self._fill_missing(range(min(self.num_slots, self.num_layers)))

    def fills_at_wait(self, layer: int) -> Sequence[Fill]:
        """Layers to fetch before `layer` can be waited for: none in the steady state.

        Out of step, `layer` itself and the layers after it that the other slots should hold.
        """
        if self._holds[self.slot(layer)] == layer:
            return ()
        return self._fill_missing(range(layer, min(layer + self.num_slots, self.num_layers)))

    def fills_before(self, layers: Sequence[int]) -> Sequence[Fill]:
        """Layers to fetch before a graph that reads `layers`, one per slot, is launched."""
        return self._fill_missing(layers)

    def graph_left(self, layer: int) -> None:
        """Note that a graph has fetched and consumed layers of its own, and left `layer` in its slot."""
        self._holds[self.slot(layer)] = layer

    def fills_at_record(self, layer: int) -> Sequence[Fill]:
        """Layers to fetch now that `layer` has been consumed and its slot is free: at most one."""
        following, slot = self._following[layer], self.slot(layer)
        if self._holds[slot] == following:
            return ()
        self._holds[slot] = following
        return (Fill(following, after=layer, is_repair=False),)

    def _fill_missing(self, layers: Sequence[int]) -> list[Fill]:
        fills = []
        for layer in layers:
            slot = self.slot(layer)
            before = self._holds[slot]
            if before != layer:
                fills.append(Fill(layer, after=before, is_repair=before is not None))
                self._holds[slot] = layer
        return fills

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
So does a fill that could not be enqueued: the slot then holds no layer until it is filled again.
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
    """A layer to fetch into its slot; the schedule hears of it by `begin_fill` and `end_fill`.

    Args:
        layer: index in the ring.
        after: the layer that the slot held last; the copies wait for its record. None if it was never
            filled.
        is_repair: the forward is out of step. It is not known whether `after` was recorded since its
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
    _held: list[int | None] = field(init=False)
    _following: list[int] = field(init=False)

    def __post_init__(self) -> None:
        assert self.num_layers >= 1 and self.num_slots >= 1
        self.forget()
        self._following = [
            layer + self.num_slots if layer + self.num_slots < self.num_layers else self.slot(layer)
            for layer in range(self.num_layers)
        ]

    @property
    def state(self) -> tuple[tuple[int | None, int | None], ...]:
        """By slot, the layer that it holds or is being filled with, and the last that it held whole.

        They differ where a fill could not be enqueued: what such a slot holds is unknown (None).
        """
        return tuple(zip(self._holds, self._held, strict=True))

    @state.setter
    def state(self, state: tuple[tuple[int | None, int | None], ...]) -> None:
        self._holds = [holds for holds, _ in state]
        self._held = [held for _, held in state]

    def slot(self, layer: int) -> int:
        """Return the slot that `layer` uses."""
        return layer % self.num_slots

    def forget(self) -> None:
        """Forget what the slots hold, which is out of date; no copy is under way."""
        self._holds = [None] * self.num_slots
        self._held = [None] * self.num_slots

    def begin_fill(self, fill: Fill) -> None:
        """Note that copies are about to be enqueued: until all are, the slot holds no layer."""
        slot = self.slot(fill.layer)
        self._holds[slot], self._held[slot] = None, fill.after

    def end_fill(self, fill: Fill) -> None:
        """Note that all copies are enqueued: a kernel that waits for them finds the layer."""
        slot = self.slot(fill.layer)
        self._holds[slot] = self._held[slot] = fill.layer

    def fills_at_begin(self) -> Sequence[Fill]:
        """Layers to fetch when a forward begins: the first ones, where the slots lack them.

        Only after a forward that was cut short, or the very first.
        """
        return self._missing(range(min(self.num_slots, self.num_layers)))

    def fills_at_wait(self, layer: int) -> Sequence[Fill]:
        """Layers to fetch before `layer` can be waited for: none in the steady state.

        Out of step, `layer` itself and the layers after it that the other slots should hold.
        """
        if self._holds[self.slot(layer)] == layer:
            return ()
        return self._missing(range(layer, min(layer + self.num_slots, self.num_layers)))

    def fills_before(self, layers: Sequence[int]) -> Sequence[Fill]:
        """Layers to fetch before a graph that reads `layers`, one per slot, is launched."""
        return self._missing(layers)

    def graph_left(self, layer: int) -> None:
        """Note that a graph has fetched and consumed layers of its own, and left `layer` in its slot."""
        slot = self.slot(layer)
        self._holds[slot] = self._held[slot] = layer

    def fills_at_record(self, layer: int) -> Sequence[Fill]:
        """Layers to fetch now that `layer` has been consumed and its slot is free: at most one."""
        following = self._following[layer]
        if self._holds[self.slot(layer)] == following:
            return ()
        return (Fill(following, after=layer, is_repair=False),)

    def _missing(self, layers: Sequence[int]) -> list[Fill]:
        """Return the fills of those of `layers`, each in a slot of its own, that are not there."""
        slots = {layer: self.slot(layer) for layer in layers}
        return [
            Fill(layer, after=self._held[slot], is_repair=self._held[slot] is not None)
            for layer, slot in slots.items()
            if self._holds[slot] != layer
        ]

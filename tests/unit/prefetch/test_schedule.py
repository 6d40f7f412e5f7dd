"""The slot schedule, checked against a device that copies in the most awkward order it may.

The simulated device knows what every slot really contains. It fails if a slot is written while a
layer that reads it has not been consumed, if two fills write one slot, or if a layer runs before its
slot holds it.
"""

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dwdp.device.queue import Waves
from vllm_dwdp.prefetch.ring import Ring

NUM_SLOTS = 2


class AdversarialQueue:
    """Completes fills as late as `wait` allows, or at random moments before."""

    def __init__(self, random_source: random.Random) -> None:
        self.random = random_source
        self.contents: dict[int, int | None] = {}
        self.in_flight: list[int] = []
        self.reading: int | None = None
        self.num_fills = 0
        self.slot_of: dict[int, int] = {}

    def add_batch(self, waves: Waves) -> int:
        batch = len(self.slot_of)
        self.slot_of[batch] = waves[0][0][0]
        return batch

    slice_bytes = 1

    def describe(self) -> str:
        return "as late as it may"

    def issue(self, batch: int, after: int | None) -> None:
        slot = self.slot_of[batch]
        assert all(self.slot_of[other] != slot for other in self.in_flight), "two fills, one slot"
        assert self.reading is None or self.slot_of[self.reading] != slot, "slot is being read"
        self.contents[slot] = None
        self.in_flight.append(batch)
        self.num_fills += 1
        self.progress()

    def progress(self) -> None:
        for batch in list(self.in_flight):
            if self.random.random() < 0.3:
                self.complete(batch)

    def complete(self, batch: int) -> None:
        self.in_flight.remove(batch)
        self.contents[self.slot_of[batch]] = batch

    def wait(self, batch: int) -> float:
        late = batch in self.in_flight
        if late:
            self.complete(batch)
        return 1e-6 if late else 0.0

    def record(self, batch: int) -> None:
        assert self.reading is None, "recorded while its kernels run"

    def drain(self) -> None:
        for batch in list(self.in_flight):
            self.complete(batch)

    def close(self) -> None:
        self.drain()

    @property
    def busy_seconds(self) -> float:
        return 0.0

    def run_layer(self, batch: int) -> None:
        assert self.contents.get(self.slot_of[batch]) == batch, "the slot holds another layer"
        self.reading = batch
        self.progress()
        assert self.contents[self.slot_of[batch]] == batch, "the slot changed under the kernels"
        self.reading = None


def make(num_layers: int, seed: int) -> tuple[Ring, AdversarialQueue]:
    queue = AdversarialQueue(random.Random(seed))
    batches = [[[(layer % NUM_SLOTS, 0, 1)]] for layer in range(num_layers)]
    peers = [{1: 1}] * num_layers
    return Ring(batches, peers, queue, num_slots=NUM_SLOTS), queue


def forward(ring: Ring, queue: AdversarialQueue, layers: Sequence[int], *, begin: bool) -> None:
    if begin:
        ring.begin_forward()
    for layer in layers:
        ring.wait(layer)
        queue.run_layer(layer)
        ring.record(layer)


@settings(max_examples=150, deadline=None)
@given(num_layers=st.integers(1, 200), seed=st.integers(0, 2**32), data=st.data())
def test_any_sequence_of_whole_cut_and_skipping_forwards_is_safe_and_makes_progress(
    num_layers: int, seed: int, data: st.DataObject
) -> None:
    ring, queue = make(num_layers, seed)
    for _ in range(data.draw(st.integers(1, 5))):
        stop = data.draw(st.integers(0, num_layers))
        skipped = set(data.draw(st.lists(st.integers(0, num_layers - 1), max_size=2)))
        layers = [layer for layer in range(stop) if layer not in skipped]
        forward(ring, queue, layers, begin=data.draw(st.booleans()))
        if data.draw(st.booleans()) and stop < num_layers:
            ring.wait(stop)  # an aborted forward: waited, never recorded
    forward(ring, queue, range(num_layers), begin=False)


@given(num_layers=st.integers(1, 64), seed=st.integers(0, 2**32), num_forwards=st.integers(2, 5))
def test_in_the_steady_state_each_layer_is_filled_once_a_forward_and_nothing_repairs(
    num_layers: int, seed: int, num_forwards: int
) -> None:
    ring, queue = make(num_layers, seed)
    forward(ring, queue, range(num_layers), begin=True)
    queue.drain()
    assert ring.counters().repairs == 0, "a healthy start repairs nothing"
    assert ring.counters().first_fills == min(NUM_SLOTS, num_layers)
    fills = queue.num_fills
    for _ in range(num_forwards):
        forward(ring, queue, range(num_layers), begin=True)
    sharing = [len(range(slot, num_layers, NUM_SLOTS)) for slot in range(NUM_SLOTS)]
    per_forward = sum(count for count in sharing if count > 1)  # alone in its slot: it stays
    assert ring.counters().repairs == 0
    assert queue.num_fills - fills == num_forwards * per_forward


def test_a_ring_that_fits_its_slots_is_filled_once() -> None:
    for num_layers in (1, 2):
        ring, queue = make(num_layers, seed=0)
        for _ in range(10):
            forward(ring, queue, range(num_layers), begin=True)
        assert queue.num_fills == num_layers


def test_without_the_wait_the_simulated_device_notices() -> None:
    ring, queue = make(5, seed=1)
    forward(ring, queue, range(5), begin=True)
    noticed = False
    for layer in range(5):
        try:
            queue.run_layer(layer)
        except AssertionError:
            noticed = True
    assert noticed


def test_a_forward_out_of_step_heals_and_a_first_fill_is_no_heal() -> None:
    ring, queue = make(5, seed=2)
    forward(ring, queue, range(3), begin=True)  # cut short: the slots expect layers 3 and 4
    forward(ring, queue, range(5), begin=True)
    counters = ring.counters()
    assert (counters.first_fills, counters.repairs) == (2, 2)
    assert counters.fills == queue.num_fills

"""Runs a ring's schedule on a device. The worker's main thread calls it; the queue copies.

`wait` and `record` bracket every layer's kernels; `begin_forward` only lets the first copies start
earlier after an interruption. One invariant carries both devices:

    A fill is enqueued only after the record that it waits for, and that record only after every kernel
    that may read the slot; a wait is enqueued only after the fill that it waits for.

So the order of our calls is an order in which the device can do everything: whatever an event or a graph
waits for stands before it. Nothing can hang, however far the host is ahead and however soon a full
queue holds it up; and an event, which stands for its latest record only, always stands for the right
one. `tests/unit/prefetch/test_every_order.py` walks all that a forward may do, captured or not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_dwdp.device.queue import CopyQueue, Waves
from vllm_dwdp.prefetch.schedule import Fill, SlotSchedule


@dataclass(frozen=True, kw_only=True)
class RingCounters:
    """What a ring has done since it was made.

    Args:
        fetched_bytes: by peer rank.
        wait_seconds: the host slept for late copies.
        late_layers: waits that had to sleep.
        fills: layers fetched.
        first_fills: of these, into slots that held nothing.
        repairs: of these, in place of another layer that a forward out of step had left behind.
    """

    fetched_bytes: dict[int, int]
    wait_seconds: float
    late_layers: int
    fills: int
    first_fills: int
    repairs: int


class Ring:
    """The layers of one model, the slots that they share and the queue that fills them.

    Args:
        batches: the copies of each layer, wave by wave, in the order in which the layers run.
        peer_bytes: bytes that each layer copies from each peer rank.
        queue: the device's queue; it must outlive the ring.
        num_slots: slots of the ring.
    """

    def __init__(
        self,
        batches: Sequence[Waves],
        peer_bytes: Sequence[dict[int, int]],
        queue: CopyQueue,
        *,
        num_slots: int,
    ) -> None:
        assert len(batches) == len(peer_bytes)
        self._schedule = SlotSchedule(num_layers=len(batches), num_slots=num_slots)
        self._queue = queue
        self.batches = tuple(queue.add_batch(batch) for batch in batches)
        self._peer_bytes = peer_bytes
        self._num_fills = [0] * len(batches)
        self._wait_seconds = 0.0
        self._late_layers = self._first_fills = self._repairs = 0

    def slot(self, layer_index: int) -> int:
        """Return the slot that the layer uses."""
        return self._schedule.slot(layer_index)

    def layer_bytes(self, layer_index: int) -> dict[int, int]:
        """Bytes that a fill of the layer copies, by peer rank."""
        return dict(self._peer_bytes[layer_index])

    def begin_forward(self) -> None:
        """Start a forward: fetch the first layers now, if an interruption left others behind."""
        self._fill(self._schedule.fills_at_begin())

    def wait(self, layer_index: int) -> None:
        """Return (or order the stream) once the layer's slot holds the layer."""
        self._fill(self._schedule.fills_at_wait(layer_index))
        self._await(layer_index)

    def record(self, layer_index: int) -> None:
        """Refill the slot of a layer whose kernels are done or enqueued with the next that uses it."""
        self._queue.record(self.batches[layer_index])
        self._fill(self._schedule.fills_at_record(layer_index))

    def prepare(self, layers: Sequence[int]) -> None:
        """Order the stream after the arrival of all of `layers`: a graph that reads them follows."""
        self._fill(self._schedule.fills_before(layers))
        for layer in layers:
            self._await(layer)

    def graph_ran(self, fills: Sequence[int], consumed: Sequence[int]) -> None:
        """Note a launched graph that made `fills` itself and consumed these layers last, in order."""
        for layer in fills:
            self._num_fills[layer] += 1
        for layer in consumed:  # all before the first record, whose fill may fail
            self._schedule.graph_left(layer)
        for layer in consumed:
            self.record(layer)

    def synchronize(self) -> None:
        """Block until no copy is queued or running."""
        self._queue.drain()

    def forget(self) -> None:
        """Fetch what lies in the slots again: the layers have new weights. No forward runs."""
        self.synchronize()
        self._schedule.forget()

    def close(self) -> None:
        """Let running copies finish: the slots may go afterwards."""
        self.synchronize()

    def counters(self) -> RingCounters:
        """Return a snapshot."""
        fetched: dict[int, int] = {}
        for num_fills, peers in zip(self._num_fills, self._peer_bytes, strict=True):
            for peer, num_bytes in peers.items():
                fetched[peer] = fetched.get(peer, 0) + num_fills * num_bytes
        return RingCounters(
            fetched_bytes=fetched,
            wait_seconds=self._wait_seconds,
            late_layers=self._late_layers,
            fills=sum(self._num_fills),
            first_fills=self._first_fills,
            repairs=self._repairs,
        )

    def _await(self, layer: int) -> None:
        seconds = self._queue.wait(self.batches[layer])
        if seconds > 0.0:
            self._wait_seconds += seconds
            self._late_layers += 1

    def _fill(self, fills: Sequence[Fill]) -> None:
        """Issue the copies of these layers, each behind whatever still uses its slot.

        Raises:
            TransferError: the device refused copies. A later forward fetches that layer again.
        """
        for fill in fills:
            after = None if fill.after is None else self.batches[fill.after]
            if fill.is_repair:
                assert after is not None
                self._queue.wait(after)
                self._queue.record(after)
            self._schedule.begin_fill(fill)
            self._queue.issue(self.batches[fill.layer], after)
            self._schedule.end_fill(fill)
            self._repairs += fill.is_repair
            self._first_fills += fill.after is None
            self._num_fills[fill.layer] += 1

"""The prefetch side of one rank: slots, ring views, copy plans, and one ring per model.

A target model and its drafter each run their own layers in their own order, so each has a ring with
slots of its own, as many and as large as its own layers need; all share one copy queue. Built once at
start; afterwards the operators drive it.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from vllm_dwdp.compat.worker import cuda_graphs
from vllm_dwdp.device.queue import GraphQueue, ResolvedSlice, Waves
from vllm_dwdp.layout.slots import SlotLayout
from vllm_dwdp.model_executor import ops
from vllm_dwdp.model_executor.composites import CompositeMapper, LayerView
from vllm_dwdp.model_executor.routed_experts import RingPosition
from vllm_dwdp.prefetch.captured_ring import CapturedRing
from vllm_dwdp.prefetch.copy_plan import CopySlice, bytes_by_peer, plan_layer_copies
from vllm_dwdp.prefetch.ring import Ring, RingCounters
from vllm_dwdp.prefetch.schedule import ring_slots


class PrefetchRings:
    """The open rings; `close` gives slots, views and queue back and is idempotent.

    Args:
        mapper: makes the ring views.
        rings: indices of each model's layers, in the order in which they run.
        slice_bytes: size of one copy; None for the device's, 0 for whole runs.
    """

    def __init__(
        self, mapper: CompositeMapper, rings: Sequence[Sequence[int]], slice_bytes: int | None
    ) -> None:
        with ExitStack() as undo:
            self._open(replace(mapper, resources=undo), rings, slice_bytes, undo)
            self._resources = undo.pop_all()

    def _open(
        self,
        mapper: CompositeMapper,
        rings: Sequence[Sequence[int]],
        slice_bytes: int | None,
        resources: ExitStack,
    ) -> None:
        self._device = device = mapper.device
        self.slot_bytes = 0
        self.positions: dict[int, RingPosition] = {}
        self.views: dict[int, LayerView] = {}
        for ring, members in enumerate(rings):
            layers = [mapper.layout.layers[layer] for layer in members]
            layout = SlotLayout.plan(layers, mapper.dwdp_rank, device.pool_page_bytes)
            num_slots = ring_slots(len(members))
            self.slot_bytes += num_slots * layout.num_bytes
            slots = device.new_slots(num_slots, layout)
            resources.callback(slots.close)
            for index, layer in enumerate(members):
                self.positions[layer] = RingPosition(ring, index)
                self.views[layer] = mapper.ring_view(layer, slots, index % num_slots, layout)
        self.queue = device.make_queue()
        resources.callback(self.queue.close)
        self.rings = [self._make_ring(mapper, members, slice_bytes) for members in rings]
        for made in self.rings:
            resources.callback(made.close)
        driven: Sequence[Ring | CapturedRing] = self.rings
        if isinstance(self.queue, GraphQueue):
            driven = followers = [CapturedRing(made, self.queue) for made in self.rings]
            resources.enter_context(cuda_graphs.followed_by(followers))
        self._driven = driven
        resources.callback(ops.install_rings, [])
        ops.install_rings(driven)

    def close(self) -> None:
        """Let running copies finish and release everything; layers must not run over the views again."""
        self._resources.close()

    def begin_forward(self) -> None:
        """Begin the target's ring for a forward; a drafter's ring is begun by its own first wait.

        It is not known whether the drafter will run after it.
        """
        self._driven[0].begin_forward()

    def synchronize(self) -> None:
        """Block until no copy reads a peer."""
        self.queue.drain()

    def forget(self) -> None:
        """Fetch all layers anew in the next forward: they have new weights. No forward runs now."""
        for ring in self.rings:
            ring.forget()

    def hold(self, layer: int) -> None:
        """Fetch a layer into its slot, and return when it is there. No forward runs now.

        The next forward fetches its layers anew.

        Args:
            layer: index in the layout.

        Raises:
            TransferError: the device refused copies.
        """
        position = self.positions[layer]
        ring = self.rings[position.ring]
        self._device.synchronize()  # kernels may still read the slot
        ring.forget()
        self.queue.issue(ring.batches[position.index], None)
        self.queue.drain()

    def counters(self) -> list[RingCounters]:
        """Return a snapshot of each ring."""
        return [ring.counters() for ring in self.rings]

    def _make_ring(
        self, mapper: CompositeMapper, members: Sequence[int], slice_bytes: int | None
    ) -> Ring:
        if slice_bytes is None:
            slice_bytes = self.queue.slice_bytes
        batches: list[Waves] = []
        peer_bytes: list[dict[int, int]] = []
        for member in members:
            layer = mapper.layout.layers[member]
            plan = plan_layer_copies(layer, mapper.dwdp_rank, slice_bytes)
            batches.append(
                [[self._resolve(mapper, member, copy) for copy in wave] for wave in plan]
            )
            peer_bytes.append(bytes_by_peer(plan))
        return Ring(batches, peer_bytes, self.queue, num_slots=ring_slots(len(members)))

    def _resolve(self, mapper: CompositeMapper, member: int, copy: CopySlice) -> ResolvedSlice:
        return (
            self.views[member].addresses[copy.weight] + copy.offset,
            mapper.peers[copy.peer_rank].address + copy.source_offset,
            copy.num_bytes,
        )

"""One rank's membership of its group: its shard, its peers' shards, the composite tensors, the ring.

`ExpertGroup.join` runs once at start, in the worker's main thread, as one transaction: whatever
fails, everything made so far is given back. Afterwards nothing here waits for another rank; the
layers read composite tensors, and in prefetch mode the pipeline's native threads fill the slots.

Order of a start, the same on every rank:

::

    load shard -> publish -> meet peers -> copy edge bytes -> ready -> all ready -> map -> bind

A rank that comes back adopts the shard of its earlier life from any survivor instead of loading it,
and gets the shard of a peer that is dead from whoever holds it. So a shard is stored once whoever
dies, and survivors have nothing to exchange.
"""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dwdp.config import DwdpConfig, DwdpLaunch
from vllm_dwdp.distributed.rendezvous import PeerShard, Rendezvous
from vllm_dwdp.errors import PeerMismatchError
from vllm_dwdp.logger import format_gib, init_logger
from vllm_dwdp.memory import host
from vllm_dwdp.memory.layout import LayerLayout, ModelLayout
from vllm_dwdp.memory.tensor import tensor_at
from vllm_dwdp.model_executor import ops
from vllm_dwdp.model_executor.expert_shard import ExpertShard, ShardedLayer
from vllm_dwdp.model_executor.routed_experts import RingPosition
from vllm_dwdp.transfer.copy_plan import CopySlice, bytes_by_peer, plan_layer_copies
from vllm_dwdp.transfer.device import ResolvedSlice
from vllm_dwdp.transfer.host_queue import HostCopyQueue
from vllm_dwdp.transfer.mode_policy import Mode, ModePolicy
from vllm_dwdp.transfer.pipeline import PrefetchPipeline

logger = init_logger(__name__)

NUM_SLOTS = 2
FILES_PER_PEER = 4  # the peer's shard, a hello each way, a status request
FILES_AROUND = 64  # checkpoint files, sockets, the slots, and what vLLM opens meanwhile


@dataclass
class ForwardCounter:
    """Forwards of the model, by how far they came."""

    begun: int = 0
    ended: int = 0


class ExpertGroup:
    """The open membership of one rank; `close` gives everything back."""

    def __init__(
        self, launch: DwdpLaunch, rank: int, shard: ExpertShard, resources: ExitStack
    ) -> None:
        self.launch = launch
        self.rank = rank
        self.dwdp_rank = launch.dwdp_rank(rank)
        self.shard = shard
        self.policy = make_policy(launch.config)
        self._steps: dict[str, int] = {}
        self._forwards = ForwardCounter()
        self._resources = resources
        self._peers: dict[int, PeerShard] = {}
        self._views: dict[int, host.Mapping] = {}
        self._pipelines: list[PrefetchPipeline] = []
        self._queue: HostCopyQueue | None = None
        self._start_seconds = 0.0
        self._layout: ModelLayout
        self._rendezvous: Rendezvous

    @classmethod
    def join(
        cls,
        launch: DwdpLaunch,
        rank: int,
        load_model: Callable[[], torch.nn.Module],
        make_rendezvous: Callable[[], Rendezvous],
    ) -> "ExpertGroup":
        """Load this rank's experts, meet the group and bind every layer to all experts.

        Args:
            launch: what the front end decided.
            rank: our global data-parallel rank.
            load_model: vLLM's own loading, run while layers are replaced.
            make_rendezvous: a started rendezvous, so that peers learn of us while we load.

        Raises:
            DwdpError: any step failed; nothing is left open.
        """
        host.check_open_files(
            FILES_PER_PEER * launch.config.group_size + FILES_AROUND,
            f"a group of {launch.config.group_size} ranks",
        )
        started = time.monotonic()
        with ExitStack() as undo:
            rendezvous = undo.enter_context(make_rendezvous())
            adopted = _adopt_shard(rendezvous, rank)
            shard = ExpertShard(launch.config, launch.dwdp_rank(rank), adopted)
            undo.callback(shard.close)
            group = cls(launch, rank, shard, undo)
            group._rendezvous = rendezvous
            loading = time.monotonic()
            with shard.loading():
                model = load_model()
            group._layout = shard.finish_loading(model)
            group._log_loaded(time.monotonic() - loading)
            group._meet()
            group._bind()
            group._couple(model)
            group._start_seconds = time.monotonic() - started
            group._resources = undo.pop_all()
        return group

    @property
    def mode(self) -> str:
        """`direct` or `prefetch`: the mode that every step of this rank runs in."""
        mode = self.policy.only_mode
        assert mode is not None, "on the host a rank has one view of its peers"
        return mode.value

    def begin_step(self, num_tokens: int) -> None:
        """The scheduler starts a step of `num_tokens` on this rank."""
        mode = self.policy.mode_for(num_tokens).value
        self._steps[mode] = self._steps.get(mode, 0) + 1

    def _begin_forward(self, *_: object) -> None:
        """A forward of the model starts: a real, dummy, profiling or warm-up one."""
        self._forwards.begun += 1
        for pipeline in self._pipelines:
            pipeline.begin_forward()

    def _end_forward(self, *_: object) -> None:
        """It ended, also by an exception; a ring that was cut short heals at the next wait."""
        self._forwards.ended += 1

    def _couple(self, model: torch.nn.Module) -> None:
        """Mark begin and end of every forward of `model`, outside of what is compiled."""
        for handle in (
            model.register_forward_pre_hook(self._begin_forward),
            model.register_forward_hook(self._end_forward, always_call=True),
        ):
            self._resources.callback(handle.remove)

    def close(self) -> None:
        """Stop the ring, forget the peers and release all memory. Layers must not run again."""
        self._resources.close()

    def status(self) -> dict[str, Any]:
        """A JSON-compatible snapshot for `/metrics` and `vllm-dwdp status`."""
        layout, rank = self._layout, self.dwdp_rank
        slot_bytes = NUM_SLOTS * layout.slot_bytes(rank) if self._pipelines else 0
        resident_bytes = layout.resident_bytes(rank)
        counters = [pipeline.counters() for pipeline in self._pipelines]
        fetched: dict[str, int] = {}
        for counter in counters:
            for peer_rank, num_bytes in counter.fetched_bytes.items():
                fetched[str(peer_rank)] = fetched.get(str(peer_rank), 0) + num_bytes
        return {
            "rank": self.rank,
            "group": self.launch.group(self.rank),
            "dwdp_rank": rank,
            "group_size": self.launch.config.group_size,
            "mode": self.mode,
            "pid": os.getpid(),
            "generation": self._rendezvous.generation,
            "adopted": self.shard.memory.is_adopted,
            "rejoin_seconds": self._start_seconds if self.shard.memory.is_adopted else 0.0,
            "resident_expert_bytes": resident_bytes,
            "remote_expert_bytes": layout.total_bytes - resident_bytes,
            "slot_bytes": slot_bytes,
            "saved_bytes": layout.total_bytes - resident_bytes - slot_bytes,
            "policy": self.policy.reason,
            "steps": dict(self._steps),
            "forwards": self._forwards.begun,
            "unfinished_forwards": self._forwards.begun - self._forwards.ended,
            "fetched_bytes": fetched,
            "prefetch_copy_seconds": self._queue.busy_seconds if self._queue else 0.0,
            "prefetch_wait_seconds": sum(counter.wait_seconds for counter in counters),
            "late_prefetches": sum(counter.late_layers for counter in counters),
            "peers": {str(peer): state.state for peer, state in self._rendezvous.peers().items()},
        }

    def _meet(self) -> None:
        """Exchange shards with the peers and complete our edge pages."""
        memory = self.shard.memory
        readonly_fd = memory.open_readonly()
        self._resources.callback(os.close, readonly_fd)
        self._rendezvous.status_provider = self._status_while_starting
        self._rendezvous.publish(readonly_fd, memory.num_bytes)
        started = time.monotonic()
        self._peers = self._rendezvous.meet()
        for peer in self._peers.values():
            self._resources.callback(os.close, peer.fd)
        self._check_shard_sizes()
        self._views = {rank: self._map_peer(peer) for rank, peer in self._peers.items()}
        if not memory.is_adopted:
            self._fill_edges(self._views)
        self._rendezvous.announce_ready(memory.digest())
        self._rendezvous.wait_ready()
        logger.info(
            "DWDP rank %d met its %d peers in %.1f s",
            self.rank,
            len(self._peers),
            time.monotonic() - started,
        )

    def _check_shard_sizes(self) -> None:
        for rank, peer in self._peers.items():
            expected = self._layout.shard_bytes[rank]
            if peer.num_bytes != expected:
                raise PeerMismatchError(
                    f"rank {rank} of the group published a shard of {peer.num_bytes} bytes, but "
                    f"this model's layout gives it {expected}. Start every rank with the same "
                    "checkpoint, dtype and options."
                )

    def _map_peer(self, peer: PeerShard) -> host.Mapping:
        view = host.map_pages(peer.fd, 0, peer.num_bytes, writable=False)
        self._resources.callback(view.unmap)
        return view

    def _fill_edges(self, views: Mapping[int, host.Mapping]) -> None:
        """Copy the bytes that neighbours own on our first and last pages."""
        for sharded, layer in self._layers():
            for index, weight in enumerate(layer.weights):
                pages = weight.shard_pages(self.dwdp_rank)
                for edge in weight.edges(self.dwdp_rank):
                    offset = layer.shard_offset(index, edge.source_rank, edge.span.start)
                    host.copy_bytes(
                        sharded.mappings[index].address + edge.span.start - pages.start,
                        views[edge.source_rank].address + offset,
                        len(edge.span),
                    )

    def _bind(self) -> None:
        """Build the composite tensors, hand them to the layers and drop our writable mappings."""
        slots = self._make_slots() if self.mode == "prefetch" else None
        for slot, (sharded, layer) in zip(self._slot_numbers(), self._layers(), strict=True):
            tensors = {}
            for index, weight in enumerate(layer.weights):
                segments = (
                    self._direct_segments(layer, index)
                    if slots is None
                    else self._slot_segments(layer, index, slots, slot)
                )
                composite = host.map_composite(segments, weight.mapped.stop)
                self._resources.callback(composite.unmap)
                tensors[weight.name] = tensor_at(
                    composite.address, sharded.dtypes[index], sharded.shapes[index]
                )
            sharded.layer.bind(tensors)
        self.shard.memory.finish()
        host.release_free_heap()
        if slots is not None:
            self._start_pipelines(slots)
        self._rendezvous.status_provider = self.status
        self._log_bound()

    def _layers(self) -> list[tuple[ShardedLayer, LayerLayout]]:
        return list(zip(self.shard.published, self._layout.layers, strict=True))

    def _rings(self) -> list[list[int]]:
        """Indices into `_layers()` of each model's layers, in the order in which they run."""
        position = {id(entry): index for index, entry in enumerate(self.shard.published)}
        rings: dict[str, list[int]] = {}
        for entry in self.shard.layers:
            rings.setdefault(entry.model_key, []).append(position[id(entry)])
        return list(rings.values())

    def _slot_numbers(self) -> list[int]:
        """The slot within its ring's pair that each layer of `_layers()` uses."""
        slots = [0] * len(self.shard.published)
        for ring, layers in enumerate(self._rings()):
            for index, layer in enumerate(layers):
                slots[layer] = ring * NUM_SLOTS + index % NUM_SLOTS
        return slots

    def _make_slots(self) -> host.HostSlots:
        num_slots = NUM_SLOTS * len(self._rings())
        slots = host.HostSlots(num_slots, self._layout.slot_bytes(self.dwdp_rank))
        self._resources.callback(slots.close)
        return slots

    def _own_segment(self, layer: LayerLayout, index: int) -> host.Segment | None:
        pages = layer.weights[index].shard_pages(self.dwdp_rank)
        if not pages:
            return None
        offset = layer.shard_offset(index, self.dwdp_rank, pages.start)
        return host.Segment(span=pages, fd=self.shard.memory.fd, offset=offset)

    def _direct_segments(self, layer: LayerLayout, index: int) -> list[host.Segment]:
        fds = {self.dwdp_rank: self.shard.memory.fd} | {
            rank: peer.fd for rank, peer in self._peers.items()
        }
        return [
            host.Segment(
                span=segment.span,
                fd=fds[segment.source_rank],
                offset=layer.shard_offset(index, segment.source_rank, segment.span.start),
            )
            for segment in layer.weights[index].direct_segments(self.dwdp_rank)
        ]

    def _slot_segments(
        self, layer: LayerLayout, index: int, slots: host.HostSlots, slot: int
    ) -> list[host.Segment]:
        own = self._own_segment(layer, index)
        remote = [
            host.Segment(
                span=part,
                fd=slots.fd,
                offset=slots.file_offset(
                    slot, layer.slot_offset(self.dwdp_rank, index, part.start)
                ),
            )
            for part in layer.weights[index].remote_pages(self.dwdp_rank)
        ]
        return [*remote, own] if own else remote

    def _start_pipelines(self, slots: host.HostSlots) -> None:
        """One ring per model, all on one copy queue."""
        self._queue = self._resources.enter_context(HostCopyQueue())
        numbers, layers = self._slot_numbers(), self._layers()
        for ring, members in enumerate(self._rings()):
            batches: list[list[ResolvedSlice]] = []
            peer_bytes: list[dict[int, int]] = []
            for index, member in enumerate(members):
                sharded, layer = layers[member]
                sharded.layer.ring_position = RingPosition(ring, index)
                plan = plan_layer_copies(layer, self.dwdp_rank, self.launch.config.slice_bytes)
                batches.append([self._resolve(copy, slots, numbers[member]) for copy in plan])
                peer_bytes.append(bytes_by_peer(plan))
            pipeline = PrefetchPipeline(batches, peer_bytes, self._queue, num_slots=NUM_SLOTS)
            self._resources.callback(pipeline.close)
            self._pipelines.append(pipeline)
        self._resources.callback(ops.install_rings, [])
        ops.install_rings(list(self._pipelines))

    def _resolve(self, copy: CopySlice, slots: host.HostSlots, slot: int) -> ResolvedSlice:
        return (
            slots.address(slot, copy.slot_offset),
            self._views[copy.peer_rank].address + copy.source_offset,
            copy.num_bytes,
        )

    def _status_while_starting(self) -> dict[str, Any]:
        return {"rank": self.rank, "mode": self.mode, "state": "starting"}

    def _log_loaded(self, seconds: float) -> None:
        logger.info(
            "DWDP rank %d %s %s of resident experts (of %s) in %.1f s",
            self.rank,
            "adopted" if self.shard.memory.is_adopted else "loaded",
            format_gib(self._layout.resident_bytes(self.dwdp_rank)),
            format_gib(self._layout.total_bytes),
            seconds,
        )

    def _log_bound(self) -> None:
        status = self.status()
        logger.info(
            "DWDP rank %d serves in %s mode (%s): experts resident %s, remote %s, saved %s",
            self.rank,
            self.mode,
            self.policy.reason,
            format_gib(status["resident_expert_bytes"]),
            format_gib(status["remote_expert_bytes"]),
            format_gib(status["saved_bytes"]),
        )


def make_policy(config: DwdpConfig) -> ModePolicy:
    """The mode of each step on the host device: what was asked for, else direct."""
    if config.mode == "auto":
        return ModePolicy.on_host()
    return ModePolicy.forced(Mode(config.mode))


def _adopt_shard(rendezvous: Rendezvous, rank: int) -> host.AdoptedShard | None:
    """This rank's own shard of an earlier life, if a survivor holds it and its digest is right."""
    kept = rendezvous.recover()
    if kept is None:
        return None
    adopted = host.AdoptedShard(kept.fd, kept.num_bytes)
    try:
        if adopted.digest() == kept.digest:
            return adopted
    except BaseException:
        adopted.close()
        raise
    adopted.close()
    logger.warning(
        "DWDP rank %d: the shard that a peer kept for it has another digest than it had when it "
        "was made; loading it from disk, which holds it twice until the peers restart",
        rank,
    )
    return None

"""One rank's membership of its group: its shard, its peers' shards, the composite tensors, the ring.

`ExpertGroup.join` runs once at start, in the worker's main thread, as one transaction: whatever
fails, everything made so far is given back. Afterwards nothing here waits for another rank; the
layers read composite tensors, and in prefetch mode the device's copy queue fills the slots. A device
whose copies run beside the kernels has both views, and each forward uses the one that suits its size.

Order of a start, the same on every rank:

::

    load shard -> publish -> meet peers -> copy edge bytes -> ready -> all ready -> map -> bind

A rank that comes back adopts the shard of its earlier life from any survivor instead of loading it,
and gets the shard of a peer that is dead from whoever holds it. So a shard is stored once whoever
dies, and survivors have nothing to exchange.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dwdp.device.base import Device, PeerMemory
from vllm_dwdp.device.limits import check_open_files, files_needed
from vllm_dwdp.distributed.launch import DwdpLaunch, Seat
from vllm_dwdp.distributed.membership import Membership, PublishedShard
from vllm_dwdp.errors import PeerMismatchError
from vllm_dwdp.layout.composite import ModelLayout
from vllm_dwdp.logger import format_gib, init_logger
from vllm_dwdp.model_executor.adoption import adopt_shard, handles_of
from vllm_dwdp.model_executor.composites import CompositeMapper, LayerView
from vllm_dwdp.model_executor.expert_shard import ExpertShard
from vllm_dwdp.model_executor.group_status import describe_group
from vllm_dwdp.model_executor.measure import check_views, measure_costs
from vllm_dwdp.model_executor.rings import PrefetchRings
from vllm_dwdp.model_executor.routed_experts import Binding
from vllm_dwdp.prefetch.mode_policy import Mode, ModePolicy

logger = init_logger(__name__)


@dataclass
class ForwardCounter:
    """Forwards of the model, by how far they came."""

    begun: int = 0
    ended: int = 0


class ExpertGroup:
    """The open membership of one rank; `close` gives everything back."""

    def __init__(
        self,
        launch: DwdpLaunch,
        rank: int,
        device: Device,
        rendezvous: Membership,
        resources: ExitStack,
    ) -> None:
        self.launch = launch
        self.rank = rank
        self.dwdp_rank = Seat(launch, rank).dwdp_rank
        self.device = device
        self.rendezvous = rendezvous
        self.steps: dict[str, int] = {}
        self.forwards = ForwardCounter()
        self.start_seconds = 0.0
        self.is_warm = False
        self.rings: PrefetchRings | None = None
        self.policy: ModePolicy
        self.shard: ExpertShard
        self.layout: ModelLayout
        self._mode: Mode | None = None
        self._bindings: dict[Mode, list[Binding]] = {}
        self._peers: dict[int, PeerMemory] = {}
        self._resources = resources

    @classmethod
    def join(
        cls,
        launch: DwdpLaunch,
        rank: int,
        make_device: Callable[[], Device],
        load_model: Callable[[], torch.nn.Module],
        make_membership: Callable[[Device], Membership],
    ) -> "ExpertGroup":
        """Load this rank's experts, meet the group and bind every layer to all experts.

        Args:
            launch: what the front end decided.
            rank: our global data-parallel rank.
            make_device: opens the device that holds the experts.
            load_model: vLLM's own loading, run while layers are replaced.
            make_membership: ours; it answers from now on, so that peers learn of us while we load.

        Raises:
            DwdpError: any step failed; nothing is left open.
        """
        check_open_files(
            files_needed(launch.config.group_size),
            f"a group of {launch.config.group_size} ranks",
        )
        started = time.monotonic()
        with ExitStack() as undo:
            device = undo.enter_context(closing(make_device()))
            rendezvous = undo.enter_context(make_membership(device))
            rendezvous.start()
            group = cls(launch, rank, device, rendezvous, undo)
            model = group._load(load_model)
            group._meet()
            group._bind()
            group._couple(model)
            group.start_seconds = time.monotonic() - started
            group._log_bound()
            rendezvous.status_provider = group.status
            undo.callback(device.synchronize)  # kernels may still read what is given back
            group._resources = undo.pop_all()
        return group

    @property
    def mode(self) -> str:
        """`direct` or `prefetch`, or `auto` where each forward takes what suits its size."""
        mode = self.policy.only_mode
        return "auto" if mode is None else mode.value

    def begin_step(self, num_tokens: int) -> None:
        """The scheduler starts a step of `num_tokens` on this rank."""
        mode = self.policy.mode_for(num_tokens).value
        self.steps[mode] = self.steps.get(mode, 0) + 1

    def close(self) -> None:
        """Stop answering, then the ring, and release all memory. Layers must not run again."""
        self.rendezvous.close()  # first: who asks for our status reads the ring's counters
        self._resources.close()

    def status(self) -> dict[str, Any]:
        """A JSON-compatible snapshot for `/metrics` and `vllm-dwdp status`."""
        return describe_group(self)

    # --- the start, in order ------------------------------------------------------------------------

    def _load(self, load_model: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """Load the model with our experts only, or adopt them from a survivor."""
        adopted, layout = adopt_shard(self.device, self.rendezvous, self.rank)
        self.shard = ExpertShard(self.launch.config, self.dwdp_rank, self.device, adopted)
        self._resources.callback(self.shard.close)
        started = time.monotonic()
        with self.shard.loading():
            model = load_model()
        self.layout = self.shard.finish_loading(model)
        if adopted is not None and layout != self.shard.layout_digest():
            raise PeerMismatchError(_other_layout("the experts that a peer kept for this rank"))
        logger.info(
            "DWDP rank %d %s %s of resident experts (of %s) in %.1f s",
            self.rank,
            "adopted" if self.shard.memory.is_adopted else "loaded",
            format_gib(self.layout.resident_bytes(self.dwdp_rank)),
            format_gib(self.layout.total_bytes),
            time.monotonic() - started,
        )
        return model

    def _meet(self) -> None:
        """Exchange shards with the peers and complete our edge pages."""
        memory, started = self.shard.memory, time.monotonic()
        self._check_handles()
        handles = memory.export()
        self._resources.callback(handles.close)
        self.rendezvous.status_provider = self._status_while_starting
        self.device.synchronize()  # peers read our experts as soon as they are published
        self.rendezvous.publish(
            handles.fds, handles.num_bytes, handles.fabric, layout=self.shard.layout_digest()
        )
        self._resources.callback(self._close_peers)
        self._map_peers(self.rendezvous.meet())
        self.shard.fill_edges(self.layout, self._peers)
        self.rendezvous.announce_ready(memory.digest())
        self._map_peers(self.rendezvous.wait_ready())
        logger.info(
            "DWDP rank %d met its %d peers in %.1f s",
            self.rank,
            len(self._peers),
            time.monotonic() - started,
        )

    def _check_handles(self) -> None:
        """A device may pass a shard in hundreds of handles: refuse before they run out."""
        group_size = self.launch.config.group_size
        handles = sum(len(self._handle_bytes(rank)) for rank in range(group_size))
        check_open_files(files_needed(group_size, handles), f"{handles} memory handles")

    def _map_peers(self, met: dict[int, PublishedShard]) -> None:
        """Map these peers' shards, in place of earlier ones of theirs; takes over all handles."""
        try:
            while met:
                rank, peer = next(iter(met.items()))
                mapped = self._map_peer(rank, peer)
                del met[rank]
                if rank in self._peers:
                    self._peers[rank].close()
                self._peers[rank] = mapped
                if peer.is_lent:
                    self._check_lent(rank, peer.digest)
        finally:
            for peer in met.values():
                peer.close()

    def _close_peers(self) -> None:
        """What composites map of them stays until they are unmapped."""
        while self._peers:
            self._peers.popitem()[1].close()

    def _map_peer(self, rank: int, peer: PublishedShard) -> PeerMemory:
        """Map a peer's shard; takes over its handles once it returns."""
        expected = self._handle_bytes(rank)
        if peer.handle_bytes != expected:
            raise PeerMismatchError(
                f"rank {rank} of the group published a shard of {sum(peer.handle_bytes)} bytes in "
                f"{len(peer.handle_bytes)} handles, but this model's layout gives it "
                f"{sum(expected)} in {len(expected)}. Start every rank with the same checkpoint, "
                "dtype and options."
            )
        if peer.layout != self.shard.layout_digest():
            raise PeerMismatchError(_other_layout(f"the experts of rank {rank} of the group"))
        return self.device.open_peer(handles_of(peer))

    def _check_lent(self, rank: int, digest: bytes) -> None:
        """What a survivor kept of a dead rank must be what that rank published."""
        if self._peers[rank].digest() != digest:
            raise PeerMismatchError(
                f"the experts of rank {rank}, which is dead, are not what it published: the memory of "
                "a survivor that kept them has changed. Restart all ranks of the group."
            )

    def _handle_bytes(self, rank: int) -> tuple[int, ...]:
        return self.device.handle_bytes(self.layout.piece_bytes(rank))

    def _bind(self) -> None:
        """Build the views, hand them to the layers and drop our writable mappings."""
        mapper = CompositeMapper(
            device=self.device,
            layout=self.layout,
            layers=self.shard.published,
            dwdp_rank=self.dwdp_rank,
            shard=self.shard.memory,
            peers=self._peers,
            resources=self._resources,
        )
        modes = self._modes()
        direct: list[LayerView] = []
        if Mode.DIRECT in modes:
            direct = [mapper.direct_view(index) for index in range(len(self.layout.layers))]
        if Mode.PREFETCH in modes:
            self.rings = PrefetchRings(mapper, self._ring_members(), self.launch.config.slice_bytes)
            self._resources.callback(self.rings.close)
        self.policy = self._make_policy(mapper, direct)
        if self.rings is not None and self.policy.only_mode is Mode.DIRECT:
            self.rings.close()  # their slots are better spent on the KV cache
            self.rings, modes = None, (Mode.DIRECT,)
        for mode in modes:
            self._bindings[mode] = [
                self._bind_layer(index, mode, direct) for index in range(len(self.layout.layers))
            ]
            self._mode = mode
        self.shard.memory.finish()
        self.device.release_free_memory()

    def _modes(self) -> tuple[Mode, ...]:
        """The modes that any step of this rank may run in."""
        mode = self.launch.config.mode
        if mode != "auto":
            return (Mode(mode),)
        has_remote = any(layer.remote_bytes(self.dwdp_rank) for layer in self.layout.layers)
        if self.device.copies_share_compute or not has_remote:
            return (Mode.DIRECT,)
        return (Mode.DIRECT, Mode.PREFETCH)

    def _make_policy(self, mapper: CompositeMapper, direct: list[LayerView]) -> ModePolicy:
        config = self.launch.config
        if config.mode != "auto":
            return ModePolicy.forced(Mode(config.mode))
        if self.rings is None:
            return ModePolicy.direct_only(shares_compute=self.device.copies_share_compute)
        measured = next(
            index
            for index, layer in enumerate(self.layout.layers)
            if layer.remote_bytes(self.dwdp_rank)
        )
        costs = measure_costs(mapper, self.rings, measured, direct[measured])
        check_views(direct[measured], self.rings.views[measured])
        return ModePolicy.from_costs(costs, config.direct_max_tokens)

    def _bind_layer(self, index: int, mode: Mode, direct: list[LayerView]) -> Binding:
        layer = self.shard.published[index].layer
        if mode is Mode.DIRECT:
            binding: Binding = layer.bind(direct[index].tensors)
        else:
            assert self.rings is not None
            tensors, position = self.rings.views[index].tensors, self.rings.positions[index]
            binding = layer.bind(tensors, position)
        return binding

    def _ring_members(self) -> list[list[int]]:
        """Indices into the layout of each model's layers, in the order in which they run."""
        position = {id(entry): index for index, entry in enumerate(self.shard.published)}
        rings: dict[int, list[int]] = {}
        for entry in self.shard.layers:
            rings.setdefault(entry.model_number, []).append(position[id(entry)])
        return list(rings.values())

    def _couple(self, model: torch.nn.Module) -> None:
        """Mark begin and end of every forward of `model`, outside of what is compiled."""
        for handle in (
            model.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
            model.register_forward_hook(self._end_forward, always_call=True),
        ):
            self._resources.callback(handle.remove)

    # --- while serving ------------------------------------------------------------------------------

    def _begin_forward(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A forward of the model starts: a real, dummy, profiling, warm-up or captured one.

        The view is chosen here, by the tokens that this forward really computes: a captured graph
        keeps the one of its (padded) size.
        """
        self.forwards.begun += 1
        if len(self._bindings) > 1:
            self._use(self.policy.mode_for(_num_tokens(args, kwargs)))
        if self.rings is not None and self._mode is Mode.PREFETCH:
            self.rings.begin_forward()

    def _end_forward(self, *_: object) -> None:
        """It ended, also by an exception; a ring that was cut short heals at the next wait."""
        self.forwards.ended += 1

    def _use(self, mode: Mode) -> None:
        """Let every layer read through the view of `mode` from now on."""
        if mode is not self._mode:
            self._mode = mode
            for entry, binding in zip(self.shard.published, self._bindings[mode], strict=True):
                entry.layer.use(binding)

    def _status_while_starting(self) -> dict[str, Any]:
        return {"rank": self.rank, "mode": self.launch.config.mode, "state": "starting"}

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


def _num_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens of a forward: the length of the first tensor it is given, `input_ids` or the like."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() >= 1:
            return int(value.shape[0] if value.is_floating_point() else value.shape[-1])
    return 0


def _other_layout(whose: str) -> str:
    return (
        f"{whose} are laid out for other kernels or parameters than this rank's. Start every rank with "
        "the same arguments and the same VLLM_* environment."
    )

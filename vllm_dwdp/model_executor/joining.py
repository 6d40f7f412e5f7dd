"""How a rank joins its group: once at start, in the worker's main thread, as one transaction.

::

    load experts -> publish -> meet peers -> measure -> copy edges -> ready -> all ready
        -> agree on the mode -> map views -> bind

The order is the same on every rank. Each stage returns what it made and pushes its undoing; the group
is built last, from values. Whatever fails, everything made so far is given back, and the peers are told
why.

A rank that comes back adopts the shard of its earlier start from any survivor instead of loading it,
and gets the shard of a peer that is dead from a rank that holds it. So a shard is stored once, whichever
rank dies, and survivors have nothing to exchange.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from vllm_dwdp.device.base import Device
from vllm_dwdp.device.limits import check_open_files, files_needed
from vllm_dwdp.distributed.launch import Seat
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.errors import PeerMismatchError
from vllm_dwdp.layout.model import ModelLayout
from vllm_dwdp.logger import format_gib, init_logger
from vllm_dwdp.model_executor.adoption import adopt_shard
from vllm_dwdp.model_executor.composites import CompositeMapper
from vllm_dwdp.model_executor.costs import (
    ServedModel,
    choose_policy,
    log_break_even,
    measured_costs,
    proposed_limit,
)
from vllm_dwdp.model_executor.expert_shard import ExpertShard
from vllm_dwdp.model_executor.forwards import couple
from vllm_dwdp.model_executor.group import ExpertGroup
from vllm_dwdp.model_executor.peers import PeerShards, other_layout
from vllm_dwdp.model_executor.renewal import WeightRenewal
from vllm_dwdp.model_executor.start_cost import StartCost
from vllm_dwdp.model_executor.views import ExpertViews, bind_views
from vllm_dwdp.prefetch.mode_policy import ModePolicy

logger = init_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedExperts:
    """A model whose experts lie in this rank's shard.

    Args:
        shard: owned by the stack that it was loaded with.
        layout: of all experts over the group.
        model: vLLM's, its layers not bound yet.
        digest: of the shard, if it is known already; empty if not.
    """

    shard: ExpertShard
    layout: ModelLayout
    model: torch.nn.Module
    digest: bytes = b""


def join_group(
    seat: Seat,
    open_membership: Callable[[ExitStack], tuple[Device, Membership]],
    load_model: Callable[[], torch.nn.Module],
    served: ServedModel,
) -> ExpertGroup:
    """Load this rank's experts, meet the group and bind every layer to all experts.

    Args:
        seat: which rank this is.
        open_membership: opens the device that holds the experts and begins to answer, so that peers
            learn of us while we load; leaves the closing of both to the stack that it is given.
        load_model: vLLM's own loading, run while layers are replaced.
        served: what the costs of a step depend on.

    Raises:
        DwdpError: any step failed; nothing is left open.
    """
    group_size = seat.launch.config.group_size
    check_open_files(files_needed(group_size), f"a group of {group_size} ranks")
    started, cost = time.monotonic(), StartCost()
    with ExitStack() as undo:
        device, membership = open_membership(undo)
        with cost.phase("load"):
            loaded = load_experts(seat, device, membership, load_model, cost, undo)
        with cost.phase("meet"):
            peers, policy = meet_peers(seat, device, membership, loaded, served, cost, undo)
        with cost.phase("map"):
            views = map_views(seat, device, loaded, peers, policy, undo)
        loaded.shard.memory.finish()
        device.release_free_memory()
        forwards = couple(loaded.model, views, captures_graphs=device.captures_graphs, undo=undo)
        undo.callback(device.synchronize)  # kernels may still read what is given back
        seconds = time.monotonic() - started
        group = ExpertGroup(
            seat=seat,
            membership=membership,
            layout=loaded.layout,
            views=views,
            forwards=forwards,
            weights=WeightRenewal(device, membership, loaded.shard, loaded.layout, views),
            rejoin_seconds=seconds if loaded.shard.is_adopted else None,
            read_bytes=loaded.shard.read_bytes(),
            read_share=loaded.shard.read_share(),
            mappings=device.mapping_counts(),
            cost=cost,
            resources=undo.pop_all(),
        )
    _log_bound(group)
    log_break_even(seat.rank, policy, served)
    return group


def map_views(
    seat: Seat,
    device: Device,
    loaded: LoadedExperts,
    peers: PeerShards,
    policy: ModePolicy,
    undo: ExitStack,
) -> ExpertViews:
    """Show every layer all experts, where they lie or through the slots of a ring.

    Args:
        peers: closed where no copies will read a peer's whole shard.
        undo: closes the views.
    """
    mapper = CompositeMapper(
        device=device,
        layout=loaded.layout,
        layers=loaded.shard.published,
        dwdp_rank=seat.dwdp_rank,
        shard=loaded.shard.memory,
        peers=peers.mapped,
        resources=undo,
    )
    views = bind_views(mapper, policy, seat.launch.config.slice_bytes, undo)
    if views.rings is None:
        peers.close()  # the views keep what they map
    return views


def load_experts(
    seat: Seat,
    device: Device,
    membership: Membership,
    load_model: Callable[[], torch.nn.Module],
    cost: StartCost,
    undo: ExitStack,
) -> LoadedExperts:
    """Load the model with our experts only, or adopt them from a survivor.

    Raises:
        PeerMismatchError: the shard that a survivor kept was laid out for another model.
        DwdpUnsupportedError: experts of the model cannot be shared.
    """
    adopted = adopt_shard(device, membership, seat.rank, cost)
    memory = None if adopted is None else adopted.shard
    shard = ExpertShard(seat.launch.config, seat.dwdp_rank, device, memory)
    undo.callback(shard.close)
    started = time.monotonic()
    with shard.loading():
        model = load_model()
    layout = shard.finish_loading(model)
    if adopted is not None and adopted.layout != shard.layout_facts():
        kept = "the experts that a peer kept for this rank"
        raise PeerMismatchError(other_layout(kept, shard.layout_facts(), adopted.layout))
    logger.info(
        "DWDP rank %d %s %s of resident experts (of %s) in %.1f s; it read %.0f%% of the checkpoint's",
        seat.rank,
        "adopted" if shard.is_adopted else "loaded",
        format_gib(layout.resident_bytes(seat.dwdp_rank)),
        format_gib(layout.total_bytes),
        time.monotonic() - started,
        100 * shard.read_share(),
    )
    digest = b"" if adopted is None else adopted.digest
    return LoadedExperts(shard=shard, layout=layout, model=model, digest=digest)


def meet_peers(
    seat: Seat,
    device: Device,
    membership: Membership,
    loaded: LoadedExperts,
    served: ServedModel,
    cost: StartCost,
    undo: ExitStack,
) -> tuple[PeerShards, ModePolicy]:
    """Exchange shards with the peers, complete our edge pages, and agree on how to read the peers.

    What is measured is measured when all have met, and travels with the word that a shard is whole.
    """
    shard, started, config = loaded.shard, time.monotonic(), seat.launch.config
    facts = shard.layout_facts()
    peers = PeerShards(device, loaded.layout, facts, cost)
    check_open_files(
        files_needed(loaded.layout.group_size, peers.num_handles),
        f"{peers.num_handles} memory handles",
    )
    handles = shard.memory.export()
    undo.callback(handles.close)
    device.synchronize()  # peers read our experts as soon as they are published
    membership.publish(handles.fds, handles.num_bytes, handles.fabric, layout=facts)
    undo.callback(peers.close)
    peers.map_all(membership.meet())
    with cost.phase("measure"):
        costs = measured_costs(
            config, device, loaded.layout, shard.published, seat.dwdp_rank, peers.mapped, served
        )
    shard.fill_edges(loaded.layout, peers.mapped)
    membership.propose_limit(proposed_limit(config, costs))
    digest = loaded.digest or cost.digest_of(shard.memory, shard.memory.num_bytes)
    membership.announce_ready(digest)
    peers.map_all(membership.wait_ready())
    policy = choose_policy(config, device, costs, membership.agree_on_limit())
    membership.learn_update()
    shard.private_tensors(loaded.layout).complete(peers.mapped)
    logger.info(
        "DWDP rank %d met its %d peers in %.1f s",
        seat.rank,
        len(peers.mapped),
        time.monotonic() - started,
    )
    return peers, policy


def _log_bound(group: ExpertGroup) -> None:
    status = group.status()
    logger.info(
        "DWDP rank %d serves in %s mode (%s): experts resident %s, remote %s, saved %s",
        group.seat.rank,
        status["mode"],
        status["policy"],
        format_gib(status["resident_expert_bytes"]),
        format_gib(status["remote_expert_bytes"]),
        format_gib(status["saved_bytes"]),
    )
    if counts := status["mappings"]:
        logger.info(
            "DWDP rank %d maps %s",
            group.seat.rank,
            ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items()),
        )

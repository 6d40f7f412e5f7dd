"""What a rank says of itself, for `/metrics` and `vllm-dwdp status`."""

import os
from typing import TYPE_CHECKING, Any

from vllm_dwdp.distributed.launch import Seat

if TYPE_CHECKING:
    from vllm_dwdp.model_executor.group import ExpertGroup


def describe_group(group: "ExpertGroup") -> dict[str, Any]:
    """A JSON-compatible snapshot of a rank that has its experts."""
    layout, rank, rings = group.layout, group.dwdp_rank, group.rings
    slot_bytes = rings.slot_bytes if rings is not None else 0
    resident_bytes = layout.resident_bytes(rank)
    counters = rings.counters() if rings is not None else []
    fetched: dict[str, int] = {}
    for counter in counters:
        for peer_rank, num_bytes in counter.fetched_bytes.items():
            fetched[str(peer_rank)] = fetched.get(str(peer_rank), 0) + num_bytes
    return {
        "rank": group.rank,
        "state": "serving" if group.is_warm else "warming up",
        "group": Seat(group.launch, group.rank).group,
        "dwdp_rank": rank,
        "group_size": group.launch.config.group_size,
        "mode": group.mode,
        "pid": os.getpid(),
        "generation": group.rendezvous.generation,
        "adopted": group.shard.memory.is_adopted,
        "rejoin_seconds": group.start_seconds if group.shard.memory.is_adopted else 0.0,
        "resident_expert_bytes": resident_bytes,
        "remote_expert_bytes": layout.total_bytes - resident_bytes,
        "slot_bytes": slot_bytes,
        "saved_bytes": layout.total_bytes - resident_bytes - slot_bytes,
        "policy": group.policy.reason,
        "steps": dict(group.steps),
        "forwards": group.forwards.begun,
        "unfinished_forwards": group.forwards.begun - group.forwards.ended,
        "fetched_bytes": fetched,
        "prefetch_copy_seconds": rings.queue.busy_seconds if rings is not None else 0.0,
        "prefetch_wait_seconds": sum(counter.wait_seconds for counter in counters),
        "late_prefetches": sum(counter.late_layers for counter in counters),
        "peers": {str(peer): state.state for peer, state in group.rendezvous.peers().items()},
    }

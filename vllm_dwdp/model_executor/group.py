"""One rank's place in its group while it serves: what it holds, how it reads the rest, how it is.

`joining.join_group` builds it once everything else stands. Nothing here waits for another rank.
"""

import os
from contextlib import ExitStack
from typing import Any

from vllm_dwdp.distributed.launch import Seat
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.layout.model import ModelLayout
from vllm_dwdp.model_executor.forwards import Forwards
from vllm_dwdp.model_executor.renewal import WeightRenewal
from vllm_dwdp.model_executor.start_cost import StartCost
from vllm_dwdp.model_executor.views import ExpertViews


class ExpertGroup:
    """The open membership of one rank; `close` gives everything back.

    Args:
        seat: which rank this is.
        membership: answers the peers; closed first.
        layout: of all experts over the group.
        views: how the layers see all experts.
        forwards: counts what ran.
        weights: renews them, together with the group.
        rejoin_seconds: how long the start took that adopted a shard; None if it loaded its experts.
        read_bytes: of the checkpoint's large expert tensors, read for it.
        read_share: the part of them that this is.
        cost: of the start.
        mappings: what its device had mapped once everything stood, by kind.
        resources: everything else, in the order in which it was made.
    """

    def __init__(
        self,
        *,
        seat: Seat,
        membership: Membership,
        layout: ModelLayout,
        views: ExpertViews,
        forwards: Forwards,
        weights: WeightRenewal,
        rejoin_seconds: float | None,
        read_bytes: int,
        read_share: float,
        mappings: dict[str, int],
        cost: StartCost,
        resources: ExitStack,
    ) -> None:
        self.seat = seat
        self.membership = membership
        self.layout = layout
        self.views = views
        self.forwards = forwards
        self.weights = weights
        self._rejoin_seconds = rejoin_seconds
        self._read_bytes = read_bytes
        self._read_share = read_share
        self._mappings = mappings
        self._cost = cost
        self._resources = resources
        self._state = "warming up"
        membership.describe_by(self.status)

    def announce_warm(self) -> None:
        """Note that the engine has warmed up: the rank serves.

        Raises:
            DwdpUnsupportedError: a kernel has made what cannot follow its experts.
        """
        self.views.check_all_follow()
        self._state = "serving"

    def close(self) -> None:
        """Stop answering, then the ring, and release all memory. Layers must not run again."""
        self.membership.close()  # first: who asks for our status reads the ring's counters
        self._resources.close()

    def status(self) -> dict[str, Any]:
        """Return a JSON-compatible snapshot for `/metrics` and `vllm-dwdp status`."""
        fingerprint = self.membership.fingerprint
        return {
            **self.seat.status(),
            "state": self._shown_state(),
            "mode": self.views.policy.name,
            "policy": self.views.policy.reason,
            "direct_max_tokens": self.views.policy.limit,
            "break_even_tokens": self.views.policy.break_even_tokens,
            "pid": os.getpid(),
            "generation": self.membership.generation,
            "weight_update": self.membership.weights.update,
            "weights": {
                "digest": fingerprint.checkpoint_digest,
                "checkpoint": fingerprint.checkpoint,
            },
            "adopted": self._rejoin_seconds is not None,
            "rejoin_seconds": self._rejoin_seconds or 0.0,
            **self._start_status(),
            "steps": {mode.value: count for mode, count in self.forwards.by_mode.items()},
            "forwards": self.forwards.begun,
            "unfinished_forwards": self.forwards.begun - self.forwards.ended,
            "peers": {str(rank): peer.state for rank, peer in self.membership.peers().items()},
            **self._memory_status(),
            **self._prefetch_status(),
        }

    def _shown_state(self) -> str:
        if self.weights.refusal:
            return "refusing"
        return "updating" if self.membership.weights.is_under_way else self._state

    def _start_status(self) -> dict[str, Any]:
        return {
            "start_seconds": dict(self._cost.seconds),
            "read_expert_bytes": self._read_bytes,
            "read_share": self._read_share,
            "digested_bytes": self._cost.digested_bytes,
        }

    def _memory_status(self) -> dict[str, Any]:
        resident_bytes = self.layout.resident_bytes(self.seat.dwdp_rank)
        slot_bytes = 0 if self.views.rings is None else self.views.rings.slot_bytes
        remote_bytes = self.layout.total_bytes - resident_bytes
        return {
            "resident_expert_bytes": resident_bytes,
            "remote_expert_bytes": remote_bytes,
            "slot_bytes": slot_bytes,
            "saved_bytes": remote_bytes - slot_bytes,
            "mappings": self._mappings,
        }

    def _prefetch_status(self) -> dict[str, Any]:
        rings = self.views.rings
        counters = [] if rings is None else rings.counters()
        fetched: dict[str, int] = {}
        for counter in counters:
            for peer_rank, num_bytes in counter.fetched_bytes.items():
                fetched[str(peer_rank)] = fetched.get(str(peer_rank), 0) + num_bytes
        return {
            "fetched_bytes": fetched,
            "prefetch_copy_seconds": 0.0 if rings is None else rings.queue.busy_seconds,
            "prefetch_wait_seconds": sum(counter.wait_seconds for counter in counters),
            "late_prefetches": sum(counter.late_layers for counter in counters),
        }

"""What a rank says of itself when it is asked, and the question."""

from collections.abc import Callable, Sequence
from typing import Any

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.dialling import Dialler, ask_once
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.group_state import GroupState
from vllm_dwdp.distributed.published_shard import PeerState
from vllm_dwdp.distributed.waiting import Wait
from vllm_dwdp.errors import RendezvousError

LOOK_TIMEOUT_S = 0.25
"""For a look whether peers listen, while a process waits for our status."""


class RankStatus:
    """What a rank is and does. Written by the thread that starts it, read by the one that answers.

    Args:
        dialler: who it is.
        state: what it knows of its group.
    """

    def __init__(self, dialler: Dialler, state: GroupState) -> None:
        self.doing: Wait | str = "loads its experts"
        """What a start does or waits for."""
        self.provider: Callable[[], dict[str, Any]] = dict
        """Adds to the status; it says `state` once that is no longer `starting`."""
        self.num_dropped = 0
        self._dialler = dialler
        self._state = state

    def note_dropped(self) -> None:
        """Count a connection that was no peer's."""
        self.num_dropped += 1

    def peers(self) -> dict[int, PeerState]:
        """Each peer's state now; a met peer that no longer listens is dead."""
        held = self._state.held()
        dialler = self._dialler
        alive = dialler.endpoint.listening(dialler.group, held, LOOK_TIMEOUT_S)
        return self._state.peer_states(held, alive)

    def content(self) -> dict[str, Any]:
        """Return the status as JSON: what the rank is and does, its peers, and what `provider` adds."""
        failed_at, failure = self._state.last_failure
        facts: dict[str, Any] = {
            "group": self._dialler.group,
            "group_size": self._dialler.group_size,
            "dwdp_rank": self._dialler.dwdp_rank,
            "generation": self._dialler.generation,
            "state": "starting",
            "doing": str(self.doing),
            "last_failure": failure,
            "last_failure_at": failed_at,
            "dropped_connections": self.num_dropped,
        }
        facts |= self.provider()
        if "peers" not in facts:
            facts["peers"] = {str(rank): state.state for rank, state in self.peers().items()}
        if facts["state"] not in ("starting", "updating"):
            del facts["doing"]
        return facts


_WORST_FIRST = ("dead", "missing", "published", "ready")
_ADDED = ("_bytes", "late_prefetches", "dropped_connections")
_LATEST = ("_seconds", "generation", "last_failure_at")


def status_of_rank(workers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the status of a rank from those of its workers, in order of their slices.

    Bytes and counts of copies add up. Of times that pass for all of them the longest is the rank's, and
    a peer is what the worst off of its workers is. The rest is the first worker's.
    """
    found = dict(workers[0])
    if len(workers) == 1:
        return found
    for name in found:
        values = [worker[name] for worker in workers if worker.get(name) is not None]
        if name == "peers":
            found[name] = _by_key(values, _worst)
        elif name.endswith(_ADDED):
            found[name] = _by_key(values, sum) if name == "fetched_bytes" else sum(values)
        elif name.endswith(_LATEST) and values:
            found[name] = _by_key(values, max) if name == "start_seconds" else max(values)
    return found | {"group": workers[0]["group"] // len(workers)}


def _by_key(values: list[dict[str, Any]], combine: Callable[[list[Any]], Any]) -> dict[str, Any]:
    keys = dict.fromkeys(key for value in values for key in value)
    return {key: combine([value[key] for value in values if key in value]) for key in keys}


def _worst(states: list[str]) -> str:
    return min(states, key=_WORST_FIRST.index)


def query_status(endpoint: Endpoint, group: int, rank: int, timeout_s: float) -> dict[str, Any]:
    """Ask a rank how it is.

    Raises:
        RendezvousError: no process listens there, or the answer is no status.
    """
    reply = ask_once(endpoint, group, rank, messages.StatusRequest(), timeout_s)
    if reply is None:
        raise RendezvousError(f"rank {rank} of group {group} does not listen at {endpoint}")
    if not isinstance(reply, messages.Status):
        raise RendezvousError(
            f"rank {rank} of group {group} answered a status request with {type(reply).__name__}. Use "
            "the version of vllm-dwdp that its ranks run"
        )
    return reply.content

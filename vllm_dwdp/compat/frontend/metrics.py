"""DWDP metrics on vLLM's `/metrics`: what ranks say of themselves, as Prometheus metrics.

The metrics belong to the process, so that both of vLLM's registries (one process, or several API
servers) can read them. `polling` keeps them current.
"""

from typing import Any

from prometheus_client import Counter, Gauge

_LABELS = ("model_name", "engine")
_PEER_STATES = ("missing", "published", "ready", "dead")

_GAUGES = {
    "resident_expert_bytes": "Expert bytes this engine holds.",
    "remote_expert_bytes": "Expert bytes it reads from its peers.",
    "slot_bytes": "Bytes of its prefetch slots.",
    "rejoin_seconds": "Seconds it took to come back with an adopted shard; else 0.",
    "read_expert_bytes": "Bytes of large expert tensors read from the checkpoint at start.",
    "digested_bytes": "Bytes digested at start, of own shards and of lent ones.",
    "saved_bytes": "Bytes saved against a full replica.",
    "weight_update": "Number of the update that this engine's weights come from; 0: those of its start.",
    "refuses": "1 if an update of the weights failed half-way, so that it must not serve.",
    "generation_seconds": "Unix time at which this engine's rank started (its generation).",
    "last_failure_seconds": "Unix time at which a peer last died or was refused; 0: never.",
}
"""Gauges by the field of a status that they show."""

_COUNTERS = {
    "prefetch_wait_seconds": (
        "prefetch_wait_seconds",
        "Seconds that layers waited for late copies.",
    ),
    "prefetch_copy_seconds": ("prefetch_copy_seconds", "Seconds that copies took."),
    "late_prefetches": ("late_prefetch", "Layers whose copies were late."),
    "dropped_connections": ("dropped_connections", "Connections to the rank that were no peer's."),
}
"""Counters by the field of a status that they follow: name and text."""


class RankMetrics:
    """The metrics of the engines of one front end; build once per process."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._seen: dict[tuple[Any, ...], float] = {}
        self._config = _gauge(
            "config_info",
            "DWDP configuration of the engine (always 1).",
            "mode",
            "group",
            "group_size",
            "dwdp_rank",
        )
        self._gauges = {name: _gauge(name, text) for name, text in _GAUGES.items()}
        self._start_seconds = _gauge(
            "start_seconds", "Seconds that each phase of the start took.", "phase"
        )
        self._peer_state = _gauge("peer_state", "1 for the state each peer is in.", "peer", "state")
        self._fetched = _counter("fetched_bytes", "Bytes copied from each peer.", "peer")
        self._steps = _counter(
            "steps", "Forward passes of the model by the mode that they ran in.", "mode"
        )
        self._counters = {field: _counter(*each) for field, each in _COUNTERS.items()}

    def update(self, engine: int, status: dict[str, Any]) -> None:
        """Copy one rank's status into the metrics of engine `engine`."""
        labels = (self._model_name, str(engine))
        self._config.labels(
            *labels,
            status["mode"],
            str(status.get("group", 0)),
            str(status.get("group_size", 1)),
            str(status.get("dwdp_rank", 0)),
        ).set(1)
        status = status | {
            "generation_seconds": status.get("generation", 0) / 1e9,
            "last_failure_seconds": status.get("last_failure_at", 0.0),
            "refuses": status.get("state") == "refusing",
        }
        for name, gauge in self._gauges.items():
            if name in status:
                gauge.labels(*labels).set(status[name])
        for phase, seconds in status.get("start_seconds", {}).items():
            self._start_seconds.labels(*labels, phase).set(seconds)
        for peer, state in status.get("peers", {}).items():
            for candidate in _PEER_STATES:
                self._peer_state.labels(*labels, peer, candidate).set(state == candidate)
        for name, counter in self._counters.items():
            if (value := status.get(name, 0)) is not None:  # None: this device does not measure it
                self._advance(counter, labels, value)
        for peer, num_bytes in status.get("fetched_bytes", {}).items():
            self._advance(self._fetched, (*labels, peer), num_bytes)
        for mode, num_steps in status.get("steps", {}).items():
            self._advance(self._steps, (*labels, mode), num_steps)

    def _advance(self, counter: Counter, labels: tuple[str, ...], value: float) -> None:
        """Add what the rank counted since we last looked; a restarted rank counts from 0."""
        key = (id(counter), *labels)
        before = self._seen.get(key, 0.0)
        counter.labels(*labels).inc(value - before if value >= before else value)
        self._seen[key] = value


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"vllm:dwdp_{name}", text, [*_LABELS, *labels], multiprocess_mode="mostrecent")


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"vllm:dwdp_{name}", text, [*_LABELS, *labels])

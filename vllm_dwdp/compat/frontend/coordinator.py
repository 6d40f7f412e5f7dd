"""vLLM's coordinator for the ranks of one front end with several API servers.

It tells the API servers of a front end how busy its ranks are. Stock vLLM runs one for all nodes and
waits until every engine has subscribed; engines say their global index. Ours waits for those of its own
node and knows them by that index. Runs in a process of its own, made by vLLM.
"""

import copy
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import coordinator
from vllm.v1.engine.coordinator import DPCoordinator, DPCoordinatorProc


def start(vllm_config: Any) -> DPCoordinator:
    """Start the coordinator of this front end's ranks."""
    parallel = copy.copy(vllm_config.parallel_config)
    parallel.data_parallel_size = parallel.data_parallel_size_local
    parallel.data_parallel_external_lb = parallel.data_parallel_hybrid_lb = False
    run = functools.partial(_run_coordinator, parallel.data_parallel_rank)
    coordinator.DPCoordinatorProc = SimpleNamespace(run_coordinator=run)
    try:
        return DPCoordinator(
            parallel,
            enable_wave_coordination=False,
            logging_config=vllm_config.logging_config,
        )
    finally:
        coordinator.DPCoordinatorProc = DPCoordinatorProc


def _run_coordinator(first: int, **kwargs: Any) -> None:
    """Run the process of the coordinator."""
    coordinator.DPCoordinatorProc = functools.partial(NodeCoordinator, first=first)
    DPCoordinatorProc.run_coordinator(**kwargs)


class NodeCoordinator(DPCoordinatorProc):
    """The coordinator of the ranks from `first` on."""

    engines: Any

    def __init__(self, *, first: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.engines = _EnginesFrom(first, self.engines)

    def _get_engine_counts(self, do_copy: bool = False) -> list[list[int | float]]:
        """By global index, as clients read them; those of other nodes are of no interest to them."""
        elsewhere: list[list[int | float]] = [[0, 0, 0.0] for _ in range(self.engines.first)]
        return [*elsewhere, *super()._get_engine_counts(do_copy)]


class _EnginesFrom:
    """The states of one node's engines, known by their global index."""

    def __init__(self, first: int, states: list[Any]) -> None:
        self.first = first
        self._states = states

    def __iter__(self) -> Iterator[Any]:
        return iter(self._states)

    def __len__(self) -> int:
        return self.first + len(self._states)

    def __getitem__(self, index: int) -> Any:
        return self._states[index - self.first]

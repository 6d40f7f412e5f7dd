"""The executors behind `--distributed-executor-backend dwdp`: the workers of an independent rank.

They run in the engine process of each rank, and add to vLLM's only what must happen before a worker
starts: the real model config back in place, and the rank's own cores or GPUs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from vllm.platforms import current_platform

from vllm_dwdp.compat.worker import cpu, independent, reloading, remote_code
from vllm_dwdp.compat.worker.executor import (
    Hooked,
    HookedMultiprocExecutor,
    HookedUniProcExecutor,
)
from vllm_dwdp.device.openmp import on_core
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)

UPDATES = ("reload_weights", "start_weight_update", "update_weights", "finish_weight_update")
"""What workers of a rank do together or not at all: a forward needs the slices of all of them."""


class RankExecutor(Hooked):
    """Runs one rank's workers; knows nothing of the other ranks."""

    def check_weights(self) -> None:
        """Check that the engine may go on after a pause.

        Raises:
            WeightUpdateError: an update of the weights failed half-way, or is under way.
        """
        self.collective_rpc("check_weights")  # type: ignore[attr-defined]

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While active, a worker finds its rank's config, cores and GPU."""
        reloading.check_before_resuming()
        independent.restore_model_config(self.vllm_config)
        independent.match_front_end_cache(self.vllm_config)
        if self.vllm_config.model_config.trust_remote_code:
            remote_code.install()
        if not current_platform.is_cpu():
            yield
            return
        seat = independent.seat_of(self.vllm_config)
        with cpu.bound_cores(self.parallel_config, seat.core_slots, seat.num_core_slots):
            found = cpu.cores_of_workers(self.vllm_config)
            for each, cores in zip(seat.of_tensor_ranks, found, strict=False):
                logger.info("DWDP rank %s computes on cores %s", each.name, cores)
            with self.confined(found) if found else nullcontext():
                yield

    def confined(self, cores: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
        """Keep each worker on its `cores`, and take its memory from their node."""
        raise NotImplementedError


class DwdpExecutor(RankExecutor, HookedUniProcExecutor):
    """Runs the rank's worker in the engine process, whose other threads share the rank's cores."""

    _computing: Callable[[], AbstractContextManager[None]] = nullcontext

    @contextmanager
    def confined(self, cores: Sequence[Sequence[int]]) -> Iterator[None]:
        """Bind this process, for good."""
        (own,) = cores
        cpu.confine_this_thread(own)
        cpu.compute_on(own)
        if len(own) > 1:
            self._computing = partial(on_core, own[0])
        yield

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, on the first core of the rank: each of the others has a thread of its own."""
        with self._computing():
            return super().execute_model(*args, **kwargs)


class DwdpMultiprocExecutor(RankExecutor, HookedMultiprocExecutor):
    """Runs each worker of the rank in a process of its own, and leaves the engine's to the scheduler.

    With tensor parallelism inside of the rank there are several. vLLM ends all of them, and the engine,
    when one dies.
    """

    def confined(self, cores: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
        """Bind this thread while it starts a worker, which inherits the cores."""
        return cpu.confined_workers()

    def explained(self, method: str | Callable[..., Any], errors: Sequence[str]) -> str:
        """Return what to say of a call that failed; no worker serves if one has other weights.

        The workers of one tensor rank agree on new weights, and know nothing of the other workers.
        """
        said = super().explained(method, errors)
        if method not in UPDATES or (all(errors) and not any(self.collective_rpc("refusal"))):
            return said
        refusals: list[str] = self.collective_rpc("refuse", args=(said,))
        return refusals[0]

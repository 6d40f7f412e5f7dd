"""The executors behind `--distributed-executor-backend dwdp`: one worker per independent rank.

They run in the engine process of each rank, and add to vLLM's only what must happen before the worker
starts: the real model config back in place, and the rank's own cores or GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.platforms import current_platform

from vllm_dwdp.compat.worker import cpu, independent, remote_code
from vllm_dwdp.compat.worker.executor import (
    Hooked,
    HookedMultiprocExecutor,
    HookedUniProcExecutor,
)
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)


class RankExecutor(Hooked):
    """Runs one rank's worker; knows nothing of the other ranks."""

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While active, the worker finds its rank's config, cores and GPU."""
        independent.restore_model_config(self.vllm_config)
        if self.vllm_config.model_config.trust_remote_code:
            remote_code.install()
        if not current_platform.is_cpu():
            yield
            return
        seat = independent.seat_of(self.vllm_config)
        with cpu.bound_cores(self.parallel_config, seat.rank, seat.launch.ranks.total) as cores:
            if cores is not None:
                logger.info("DWDP rank %d computes on cores %s", seat.rank, cores)
            self.bind_this_process()
            yield

    def bind_this_process(self) -> None:
        """Keep this process on the rank's cores, if the worker runs in it."""


class DwdpExecutor(RankExecutor, HookedUniProcExecutor):
    """Runs the rank's worker in the engine process."""

    def bind_this_process(self) -> None:
        """As `RankExecutor`, which surrounds the start of vLLM's worker."""
        cpu.bind_this_process(self.vllm_config)


class DwdpMultiprocExecutor(RankExecutor, HookedMultiprocExecutor):
    """Runs the rank's worker in a process of its own."""

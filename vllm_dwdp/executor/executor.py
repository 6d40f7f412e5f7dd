"""The executor behind `--distributed-executor-backend dwdp`: one worker per independent rank.

Runs in the engine process of each rank. It adds to vLLM's multiprocess executor only what must
happen before the worker starts: the real model config back in place, and the rank's own cores.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm import envs
from vllm.platforms import current_platform

from vllm_dwdp.compat.worker import cpu, independent
from vllm_dwdp.compat.worker.executor import HookedExecutor
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)


class DwdpExecutor(HookedExecutor):
    """Runs one rank's worker; knows nothing of the other ranks."""

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While active, the worker finds its rank's config, cores and GPU."""
        independent.restore_model_config(self.vllm_config)
        if not current_platform.is_cpu():
            if envs.VLLM_DP_SIZE > 1:  # SPMD style: our processes may all see all GPUs
                self.parallel_config.data_parallel_rank_local = envs.VLLM_DP_RANK_LOCAL
            yield
            return
        seat = independent.seat_of(self.vllm_config)
        with cpu.bound_cores(self.parallel_config, seat.rank, seat.launch.ranks.total) as cores:
            if cores is not None:
                logger.info("DWDP rank %d computes on cores %s", seat.rank, cores)
            yield

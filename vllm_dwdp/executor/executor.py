"""The executor behind `--distributed-executor-backend dwdp`: one worker per independent rank.

Runs in the engine process of each rank. It adds to vLLM's multiprocess executor only what must
happen before the worker starts: the real model config back in place, and the rank's own cores.
"""

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_dwdp.compat import cpu, independent
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)


class DwdpExecutor(MultiprocExecutor):
    """Runs one rank's worker; knows nothing of the other ranks."""

    def _init_executor(self) -> None:
        independent.restore_model_config(self.vllm_config)
        launch = independent.launch_of(self.vllm_config)
        rank = launch.rank(self.parallel_config.data_parallel_index)
        with cpu.bound_cores(self.parallel_config, rank, launch.data_parallel_size) as cores:
            if cores is not None:
                logger.info("DWDP rank %d computes on cores %s", rank, cores)
            super()._init_executor()

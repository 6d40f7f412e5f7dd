"""vLLM's multiprocess executor, with a hook around its start: vLLM has a private name for that only."""

from contextlib import AbstractContextManager

from vllm.v1.executor.multiproc_executor import MultiprocExecutor


class HookedExecutor(MultiprocExecutor):
    """An executor that starts its workers inside of `starting`."""

    def starting(self) -> AbstractContextManager[None]:
        """What surrounds the start of the workers."""
        raise NotImplementedError

    def _init_executor(self) -> None:
        with self.starting():
            super()._init_executor()

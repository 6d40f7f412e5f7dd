"""vLLM's executors with a hook around their start, for which vLLM has a private name only.

Both run in a rank's engine process; the worker of the first one does, too.
"""

from contextlib import AbstractContextManager, ExitStack
from multiprocessing.util import Finalize
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_dwdp.compat.worker.signals import ended_by_signals, records_signals_only


class Hooked:
    """Mixin: an executor that starts its worker inside of `starting`."""

    vllm_config: Any
    parallel_config: Any

    def starting(self) -> AbstractContextManager[None]:
        """Surround the start of the worker."""
        raise NotImplementedError


class HookedUniProcExecutor(Hooked, UniProcExecutor):
    """The worker in this process.

    Whatever ends the start ends the worker, and so does the end of this process: vLLM leaves both to the
    exit of a worker process. Signals that vLLM would only record end a start at once, because a worker
    may be waiting minutes for its peers.
    """

    _ended: Finalize

    def _init_executor(self) -> None:
        with ExitStack() as undo:
            if records_signals_only():
                undo.enter_context(ended_by_signals())
            undo.enter_context(self.starting())
            with ExitStack() as failed:
                failed.callback(self._end_worker)
                super()._init_executor()
                failed.pop_all()
        self._ended = Finalize(None, self._end_worker, exitpriority=0)

    def _end_worker(self) -> None:
        worker = getattr(self, "driver_worker", None)
        if worker is not None and "worker" in vars(worker):  # else it was never made
            worker.shutdown()

    def shutdown(self) -> None:
        """As vLLM's, once."""
        self._ended()


class HookedMultiprocExecutor(Hooked, MultiprocExecutor):
    """Each worker in a process of its own, which vLLM ends if the start does not succeed.

    Signals end a start at once, as in one process.
    """

    def _init_executor(self) -> None:
        with ExitStack() as undo:
            if records_signals_only():
                undo.enter_context(ended_by_signals())
            undo.enter_context(self.starting())
            super()._init_executor()

"""vLLM's executors with a hook around their start, for which vLLM has a private name only.

Both run in a rank's engine process; the worker of the first one does, too.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import cloudpickle
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_dwdp.compat.worker.signals import ended_by_signals, records_signals_only
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)


class Answer(NamedTuple):
    """What a worker's method returned, or what its error says; empty if it has not failed."""

    error: str
    result: Any


def answer_of(
    worker: Any, method: str | bytes, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Answer:
    """Call a method of a worker, or a function that was pickled; runs in the worker's process."""
    call = (
        getattr(worker, method)
        if isinstance(method, str)
        else partial(cloudpickle.loads(method), worker)
    )
    try:
        return Answer("", call(*args, **kwargs))
    except Exception as error:
        logger.exception("DWDP: this worker failed")
        return Answer(str(error) or type(error).__name__, None)


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

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> Any:
        """As vLLM's; a call that every worker answers ends when all have.

        vLLM raises at the first error, and takes the answers behind it for those of the next call.
        """
        if any(value is not None and value is not False for value in others.values()):
            return super().collective_rpc(method, timeout, args, kwargs, **others)
        sent = method if isinstance(method, str) else cloudpickle.dumps(method)
        answers = super().collective_rpc(answer_of, timeout, (sent, args, kwargs or {}))
        errors = [answer.error for answer in answers]
        if any(errors):
            said = self.explained(method, errors)
            raise RuntimeError(
                f"Worker failed with error '{said}', please check the stack trace above for the root "
                "cause"
            )
        return [answer.result for answer in answers]

    def explained(self, method: str | Callable[..., Any], errors: Sequence[str]) -> str:
        """Return what to say of a call that failed; `errors` by worker, empty of one that succeeded."""
        return next(filter(None, errors))

"""When the worker of an executor of one process ends; vLLM's part of the start is replaced."""

import multiprocessing
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import pytest
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_dwdp.compat.worker.executor import HookedUniProcExecutor


class Worker:
    """A worker that counts how often it was ended."""

    def __init__(self) -> None:
        self.worker = self
        self.num_ends = 0

    def shutdown(self) -> None:
        self.num_ends += 1


class Executor(HookedUniProcExecutor):
    """The product's, with nothing around its start."""

    def starting(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    made = Worker()

    def start(self: UniProcExecutor) -> None:
        self.driver_worker = made
        if self.vllm_config.fails:
            raise RuntimeError("no memory")

    monkeypatch.setattr(UniProcExecutor, "_init_executor", start)
    return made


def make(*, fails: bool = False) -> Executor:
    executor = Executor.__new__(Executor)
    executor.vllm_config = SimpleNamespace(fails=fails)
    executor._init_executor()
    return executor


def test_a_worker_ends_once_with_its_executor(worker: Worker) -> None:
    executor = make()
    assert worker.num_ends == 0
    executor.shutdown()
    executor.shutdown()
    assert worker.num_ends == 1


def test_a_worker_whose_start_fails_is_ended(worker: Worker) -> None:
    with pytest.raises(RuntimeError, match="no memory"):
        make(fails=True)
    assert worker.num_ends == 1


def test_a_start_that_fails_before_there_is_a_worker_says_why(worker: Worker) -> None:
    """vLLM's wrapper asks itself for its worker without end where it has none."""
    del worker.worker
    with pytest.raises(RuntimeError, match="no memory"):
        make(fails=True)
    assert worker.num_ends == 0


def test_a_worker_ends_with_its_process_where_vllm_forgets_it(worker: Worker) -> None:
    """An engine that cannot be built, e.g. for want of KV cache, drops its executor."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker.shutdown = lambda: sender.send("ended")  # type: ignore[method-assign]

    def fail() -> None:
        make()
        raise SystemExit(1)

    process = context.Process(target=fail)
    process.start()
    process.join(timeout=20)
    assert process.exitcode == 1
    assert receiver.poll(0)
    assert receiver.recv() == "ended"

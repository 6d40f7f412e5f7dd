"""One offline `LLM` over several independent engines: a client that deals requests out.

Stock `SyncMPClient` talks to one engine. All engines share one output socket, so only sending needs
to know of more: a request goes to the rank with room, an abort to the rank that has the request, a
utility call to every rank. Runs in the process that owns the `LLM`.
"""

import heapq
import itertools
import queue
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType, llm_engine
from vllm.v1.engine.core_client import EngineCoreClient, SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerManager

from vllm_dwdp.compat.frontend.interrupts import uninterrupted
from vllm_dwdp.errors import DwdpError

LIVENESS_INTERVAL_S = 1.0
NAME_TIMEOUT_S = 20.0
"""A dying engine says so first and ends later; only then it is known which one it was."""


class RankClient(SyncMPClient):
    """Drives N independent engines; each gets at most `capacity` unfinished requests at a time.

    The rest waits here, in the order of the scheduling policy, so that ranks are fed as they become free
    instead of being dealt fixed shares of an unequal load.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self._has_priorities = vllm_config.scheduler_config.policy == "priority"
        # A few more than a rank can run, so that it need not wait for us between requests; but none
        # that would have to wait there while a more urgent one waits here.
        num_ahead = 0 if self._has_priorities else max(1, max_num_seqs // 4)
        self._capacity = max_num_seqs + num_ahead
        self._waiting: list[tuple[int, int, EngineCoreRequest]] = []
        self._arrivals = itertools.count()
        self._unfinished: list[set[str]] = [set() for _ in self.core_engines]
        self.last_rank = 0

    def add_request(self, request: EngineCoreRequest) -> None:
        """Send the request to the least loaded rank, or keep it until one has room."""
        urgency = request.priority if self._has_priorities else 0
        heapq.heappush(self._waiting, (urgency, next(self._arrivals), request))
        self._feed()

    def abort_requests(self, request_ids: list[str]) -> None:
        """Abort each request on the rank that has it."""
        self.ensure_alive()
        wanted = set(request_ids)
        self._waiting = [entry for entry in self._waiting if entry[-1].request_id not in wanted]
        heapq.heapify(self._waiting)
        for rank, unfinished in enumerate(self._unfinished):
            if here := unfinished & wanted:
                self._unfinished[rank] = unfinished - here
                self._send_to(rank, EngineCoreRequestType.ABORT, sorted(here))
        self._feed()

    def get_output(self) -> EngineCoreOutputs:
        """Return the next outputs of any rank, which is `last_rank` then.

        Raises:
            EngineDeadError: a rank died; names it.
        """
        outputs = self._next_outputs()
        self.last_rank = outputs.engine_index
        finished = {out.request_id for out in outputs.outputs if out.finish_reason is not None}
        self._unfinished[self.last_rank] -= finished
        self._feed()
        return outputs

    def call_utility(self, method: str, *args: Any) -> Any:
        """Call `method` on every rank, and make one answer of theirs.

        Raises:
            DwdpError: they answer differently, and the method has one answer only.
            EngineDeadError: a rank died before it answered; names it.
        """
        futures: list[Future[Any]] = []
        for rank in range(len(self.core_engines)):
            call_id = uuid.uuid1().int >> 64
            future: Future[Any] = Future()
            self.utility_results[call_id] = future
            self._send_to(rank, EngineCoreRequestType.UTILITY, (0, call_id, method, args))
            futures.append(future)
        return of_all_ranks(method, [self._answer(rank, f) for rank, f in enumerate(futures)])

    def ensure_alive(self) -> None:
        """Return unless an engine is dead.

        Raises:
            EngineDeadError: one is; the message names its rank where that is known.
        """
        if self.resources.engine_dead or self._failed_process():
            raise self._death()

    def _answer(self, rank: int, future: "Future[Any]") -> Any:
        while True:
            try:
                return future.result(timeout=LIVENESS_INTERVAL_S)
            except TimeoutError:
                self.ensure_alive()
            except Exception as error:
                if str(error).endswith(": cancelled"):  # by an engine that has lost its worker
                    raise self._death() from error
                error.add_note(f"This is the answer of DWDP rank {rank}.")
                raise

    def _next_outputs(self) -> EngineCoreOutputs:
        while True:
            try:
                outputs = self.outputs_queue.get(timeout=LIVENESS_INTERVAL_S)
            except queue.Empty:
                self.ensure_alive()
                continue
            if isinstance(outputs, EngineDeadError):
                raise self._death() from None
            if isinstance(outputs, Exception):
                raise self._format_exception(outputs) from None
            return outputs

    def _failed_process(self) -> str | None:
        return getattr(self.resources.engine_manager, "failed_proc_name", None)

    def _death(self) -> EngineDeadError:
        manager = self.resources.engine_manager
        deadline = time.monotonic() + NAME_TIMEOUT_S
        while not (name := self._failed_process()) and time.monotonic() < deadline:
            if manager is None or manager.manager_stopped.wait(0.05):
                name = self._failed_process()
                break
        if not name:
            return EngineDeadError(
                "the DWDP ranks of this LLM have ended: it was closed, or one of them ended by itself. "
                "Make a new LLM."
            )
        rank = [process.name for process in manager.processes].index(name)
        return EngineDeadError(
            f"DWDP rank {rank} ({name}) died; its own error is in the log above. The other ranks were "
            "stopped with it: one offline LLM needs all its ranks."
        )

    def _feed(self) -> None:
        while self._waiting:
            rank = min(range(len(self._unfinished)), key=lambda rank: len(self._unfinished[rank]))
            if len(self._unfinished[rank]) >= self._capacity:
                return
            *_, request = heapq.heappop(self._waiting)
            self._unfinished[rank].add(request.request_id)
            self._send_to(rank, EngineCoreRequestType.ADD, request)

    def _send_to(self, rank: int, request_type: EngineCoreRequestType, request: Any) -> None:
        self.ensure_alive()
        frames = (self.core_engines[rank], request_type.value, *self.encoder.encode(request))
        with uninterrupted():
            self.input_socket.send_multipart(frames, copy=False)


def of_all_ranks(method: str, answers: Sequence[Any]) -> Any:
    """Return what the ranks' answers to `method` say of all of them.

    Answers of workers follow each other in rank order. An adapter is loaded if every rank has it: a rank
    loads one with its first request for it. It is removed if any had it. Tasks come in an order of each
    process (vLLM takes a pooler's from a set). Whatever else is true must be true of every rank.

    Raises:
        DwdpError: the answers differ otherwise.
    """
    if method == "collective_rpc" and all(isinstance(each, list) for each in answers):
        return [entry for each in answers for entry in each]
    if method == "list_loras":
        return set.intersection(*map(set, answers))
    if method == "get_supported_tasks":
        return sorted(set.intersection(*map(set, answers)))
    if all(isinstance(each, bool) for each in answers):
        return (any if method == "remove_lora" else all)(answers)
    if any(each != answers[0] for each in answers):
        raise DwdpError(
            f"{method} has one answer, and the DWDP ranks of this LLM give {list(answers)}. Bring all "
            "ranks to the same state, or ask each by collective_rpc."
        )
    return answers[0]


class RankStatLoggers(StatLoggerManager):
    """vLLM's statistics of every rank, each under its own `engine` label."""

    def __init__(self, client: RankClient, **kwargs: Any) -> None:
        self._client = client
        super().__init__(engine_idxs=list(client.engine_ranks_managed), **kwargs)

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Count for the rank whose outputs were taken last; stock counts all for engine 0."""
        super().record(*args, **kwargs | {"engine_idx": self._client.last_rank})


@contextmanager
def rank_client() -> Iterator[None]:
    """While active, an offline engine is driven through a `RankClient`, and its statistics are kept.

    What fails here once the engines run ends them: nothing else would before this process ends.
    """
    stock = EngineCoreClient.make_client
    clients: list[RankClient] = []

    def make_client(
        multiprocess_mode: bool,
        asyncio_mode: bool,
        vllm_config: Any,
        executor_class: Any,
        log_stats: bool,
        renderer: Any = None,
    ) -> EngineCoreClient:
        assert multiprocess_mode and not asyncio_mode
        clients.append(RankClient(vllm_config, executor_class, log_stats, renderer=renderer))
        return clients[-1]

    EngineCoreClient.make_client = staticmethod(make_client)
    llm_engine.StatLoggerManager = lambda **kwargs: RankStatLoggers(clients[-1], **kwargs)
    try:
        yield
    except BaseException:
        for client in clients:
            client.shutdown()
        raise
    finally:
        EngineCoreClient.make_client = stock
        llm_engine.StatLoggerManager = StatLoggerManager

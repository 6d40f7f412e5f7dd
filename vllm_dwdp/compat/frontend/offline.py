"""One offline `LLM` over several independent engines: a client that deals requests out.

Stock `SyncMPClient` talks to one engine. All engines share one output socket, so only sending needs
to know of more: a request goes to the rank with room, an abort to the rank that has the request, a
utility call to every rank. Runs in the process that owns the `LLM`.
"""

import queue
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.core_client import EngineCoreClient, SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_dwdp.errors import DwdpUnsupportedError

LIVENESS_INTERVAL_S = 1.0


class RankClient(SyncMPClient):
    """Drives N independent engines; each gets at most `capacity` unfinished requests at a time.

    The rest waits here, in order, so that ranks are fed as they become free instead of being dealt
    fixed shares of an unequal load.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        # A few more than a rank can run, so that it need not wait for us between requests.
        max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self._capacity = max_num_seqs + max(1, max_num_seqs // 4)
        self._waiting: deque[EngineCoreRequest] = deque()
        self._rank_of: dict[str, int] = {}
        self._num_unfinished = [0] * len(self.core_engines)

    def add_request(self, request: EngineCoreRequest) -> None:
        """Send the request to the least loaded rank, or keep it until one has room."""
        self._waiting.append(request)
        self._feed()

    def abort_requests(self, request_ids: list[str]) -> None:
        """Abort each request on the rank that has it."""
        self.ensure_alive()
        wanted = set(request_ids)
        self._waiting = deque(entry for entry in self._waiting if entry.request_id not in wanted)
        by_rank: dict[int, list[str]] = {}
        for request_id in request_ids:
            rank = self._finish(request_id)
            if rank is not None:
                by_rank.setdefault(rank, []).append(request_id)
        for rank, ids in by_rank.items():
            self._send_to(rank, EngineCoreRequestType.ABORT, ids)
        self._feed()

    def get_output(self) -> EngineCoreOutputs:
        """The next outputs of any rank.

        Raises:
            EngineDeadError: a rank died; names it.
        """
        outputs = self._next_outputs()
        for output in outputs.outputs:
            if output.finish_reason is not None:
                self._finish(output.request_id)
        self._feed()
        return outputs

    def call_utility(self, method: str, *args: Any) -> Any:
        """Call `method` on every rank; lists are concatenated in rank order, else the first counts."""
        futures: list[Future[Any]] = []
        for rank in range(len(self.core_engines)):
            call_id = uuid.uuid1().int >> 64
            future: Future[Any] = Future()
            self.utility_results[call_id] = future
            self._send_to(rank, EngineCoreRequestType.UTILITY, (0, call_id, method, args))
            futures.append(future)
        results = [future.result() for future in futures]
        if method == "collective_rpc" and all(isinstance(result, list) for result in results):
            return [entry for result in results for entry in result]
        return results[0]

    def ensure_alive(self) -> None:
        """Raise, with the rank's name, if an engine is dead."""
        if self.resources.engine_dead:
            raise self._death()

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

    def _death(self) -> EngineDeadError:
        manager = self.resources.engine_manager
        name = getattr(manager, "failed_proc_name", None)
        who = f"DWDP {name} died" if name else "a DWDP rank died"
        return EngineDeadError(
            f"{who}; its own error is in the log above. The other ranks were stopped with it: "
            "one offline LLM needs all its ranks."
        )

    def _feed(self) -> None:
        while self._waiting:
            rank = min(range(len(self._num_unfinished)), key=self._num_unfinished.__getitem__)
            if self._num_unfinished[rank] >= self._capacity:
                return
            request = self._waiting.popleft()
            self._rank_of[request.request_id] = rank
            self._num_unfinished[rank] += 1
            self._send_to(rank, EngineCoreRequestType.ADD, request)

    def _finish(self, request_id: str) -> int | None:
        rank = self._rank_of.pop(request_id, None)
        if rank is not None:
            self._num_unfinished[rank] -= 1
        return rank

    def _send_to(self, rank: int, request_type: EngineCoreRequestType, request: Any) -> None:
        self.ensure_alive()
        frames = (self.core_engines[rank], request_type.value, *self.encoder.encode(request))
        self.input_socket.send_multipart(frames, copy=False)


@contextmanager
def rank_client() -> Iterator[None]:
    """While active, an offline engine is driven through a `RankClient`."""
    stock = EngineCoreClient.make_client

    def make_client(
        multiprocess_mode: bool,
        asyncio_mode: bool,
        vllm_config: Any,
        executor_class: Any,
        log_stats: bool,
        renderer: Any = None,
    ) -> EngineCoreClient:
        if not multiprocess_mode or asyncio_mode:
            raise DwdpUnsupportedError(
                "VLLM_ENABLE_V1_MULTIPROCESSING=0 runs the engine in this process, and "
                "data_parallel_size > 1 needs one process per rank. Unset it."
            )
        return RankClient(vllm_config, executor_class, log_stats, renderer=renderer)

    EngineCoreClient.make_client = staticmethod(make_client)
    try:
        yield
    finally:
        EngineCoreClient.make_client = stock

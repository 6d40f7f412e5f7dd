"""The thread of a front end that asks its ranks how they are. Never in the serving path."""

import threading
from collections.abc import Sequence
from typing import Any, Protocol

from vllm_dwdp.distributed.launch import DwdpLaunch, Seat
from vllm_dwdp.distributed.status import query_status, status_of_rank
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)

INTERVAL_S = 1.0
TIMEOUT_S = 5.0
"""For a rank's answer, in which it looks at its peers."""


class StatusSink(Protocol):
    """Takes what ranks say of themselves."""

    def update(self, engine: int, status: dict[str, Any]) -> None:
        """Take the status of engine `engine`."""


class StatusPoller:
    """A daemon thread that keeps a sink current until `close`.

    Says once when a rank no longer answers, and once when it does again.

    Args:
        launch: where the ranks are.
        engines: those to ask, by their global index.
        sink: takes what they say once they have their experts.
    """

    def __init__(self, launch: DwdpLaunch, engines: Sequence[int], sink: StatusSink) -> None:
        self._launch = launch
        self._engines = engines
        self._sink = sink
        self._silent: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dwdp-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop polling."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            for engine in self._engines:
                self._poll(engine)

    def _poll(self, engine: int) -> None:
        workers = []
        for seat in self._launch.seats_of([engine]):
            try:
                workers.append(self._ask(seat))
            except (DwdpError, OSError) as error:
                self._note_silence(engine, seat, error)
                return
        if engine in self._silent:
            self._silent.remove(engine)
            logger.info("DWDP rank %d reports its metrics again", engine)
        if all("resident_expert_bytes" in status for status in workers):
            self._sink.update(engine, status_of_rank(workers))

    def _ask(self, seat: Seat) -> dict[str, Any]:
        endpoint = self._launch.endpoint
        return query_status(endpoint, seat.group, seat.dwdp_rank, timeout_s=TIMEOUT_S)

    def _note_silence(self, engine: int, seat: Seat, error: Exception) -> None:
        if engine not in self._silent:
            self._silent.add(engine)
            logger.warning(
                "DWDP rank %s does not report its metrics, which stay as they are until it does: %s",
                seat.name,
                error,
            )

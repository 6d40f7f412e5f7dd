"""Which decode servers get requests: those that were compared with the ranks since they came.

A server that comes back may be another one: of another model, or with other settings where it runs
elsewhere. So what each of them is stands in a file, and its `door`, which every request passes before it
reaches a decode server, goes by that.

Runs in launch's loop; a comparison is a thread, because it computes a prompt.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_dwdp.errors import DwdpError

ADMISSION_FILE_ENV = "DWDP_ADMISSION_FILE"
"""Variable of the relay's environment: the file."""
GONE, COMPARING, ADMITTED, REFUSED = "gone", "being compared", "admitted", "refused"
UNNAMED = "unnamed"
AGAIN_S = 10.0
"""Between two comparisons of a server that did not pass."""


@dataclass(kw_only=True)
class Candidate:
    """A decode server.

    Args:
        name: for the terminal.
        place: host and port of its door, by which the router knows it.
        identity: asks who answers: empty if no server does, `UNNAMED` where that cannot be told.
        compare: makes what compares it with the ranks; None while no rank is there.
        state: one of those above.
        reason: why it was refused.
    """

    name: str
    place: str
    identity: Callable[[], str]
    compare: Callable[[], Callable[[], None] | None]
    state: str = GONE
    reason: str = ""
    _admitted: str = ""
    _again_at: float = 0.0
    _comparison: "_Comparison | None" = None

    @property
    def shown(self) -> str:
        """Its state for `status`, in the words that it has for all servers."""
        return "serving" if self.state == ADMITTED else self.state

    def poll(self) -> str:
        """Look at it again; a line if there is news."""
        now = self.identity()
        if not now:
            self.state, self.reason = GONE, ""
            self._comparison, self._again_at = None, 0.0
        elif now == self._admitted != UNNAMED:
            self.state = ADMITTED  # it was only silent
        elif self._comparison is not None:
            return self._end_comparison(self._comparison)
        elif self.state != ADMITTED and time.monotonic() >= self._again_at:
            self._begin_comparison()
        return ""

    def admit(self) -> None:
        """Give it requests."""
        self.state, self._admitted = ADMITTED, self.identity()

    def _begin_comparison(self) -> None:
        if (work := self.compare()) is not None:
            self._comparison = _Comparison(work)
            self.state = self.state if self.state == REFUSED else COMPARING

    def _end_comparison(self, comparison: "_Comparison") -> str:
        if comparison.is_alive():
            return ""
        self._comparison = None
        known, self.reason = self.reason, str(comparison.error or "")
        self.state = REFUSED if comparison.error else ADMITTED
        self._again_at = time.monotonic() + AGAIN_S
        if self.state == ADMITTED:
            self.admit()
            return f"{self.name}: fits the ranks, and gets requests"
        return "" if self.reason == known else f"{self.name}: gets no requests: {self.reason}"


class _Comparison(threading.Thread):
    """One comparison; `error` says why the server does not fit, once the thread has ended."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.error: Exception | None = None
        self._work = work
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except DwdpError as error:
            self.error = error
        except Exception as error:  # a bug: what was not compared to its end must get nothing
            self.error = DwdpError(f"comparing it failed: {type(error).__name__}: {error}")


class Admission:
    """All decode servers of a launch, and the file that says what they are.

    Args:
        candidates: the servers.
        file: that the relay and the doors read.
    """

    def __init__(self, candidates: Sequence[Candidate], file: Path) -> None:
        self.candidates = tuple(candidates)
        self._file = file
        self._written: dict[str, list[str]] = {}

    def admit_all(self) -> None:
        """Take all of them: they were compared before a client could ask."""
        for each in self.candidates:
            each.admit()
        self._write()

    def poll(self) -> list[str]:
        """Look at all again; lines of news."""
        news = [each.poll() for each in self.candidates]
        self._write()
        return [*filter(None, news)]

    @property
    def is_complete(self) -> bool:
        """Whether all get requests."""
        return all(each.state == ADMITTED for each in self.candidates)

    def _write(self) -> None:
        now = {each.place: [each.state, each.reason] for each in self.candidates}
        if now == self._written:
            return
        new = self._file.with_suffix(".new")
        with contextlib.suppress(OSError):
            new.write_text(json.dumps(now))
            new.rename(self._file)
            self._written = now

    def remove(self) -> None:
        """Remove the file."""
        self._file.unlink(missing_ok=True)


def read_admission(environment: Mapping[str, str] = os.environ) -> dict[str, tuple[str, str]]:
    """State and reason of each decode server by its door's place; empty where it is unknown."""
    try:
        found = json.loads(Path(environment.get(ADMISSION_FILE_ENV, "")).read_text())
        return {place: (state, reason) for place, (state, reason) in found.items()}
    except (OSError, ValueError):
        return {}

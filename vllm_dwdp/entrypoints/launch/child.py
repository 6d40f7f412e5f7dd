"""A process that is kept running: started again when it dies, ended when we end.

One that served is started again at once; with back-off if it has died before and had not settled since.

It is a process group of its own, so that whatever a dead server left behind is removed before its
successor starts. What it prints goes to a log, of which the last error is told.
"""

import contextlib
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from vllm_dwdp.entrypoints.launch.process import Process, kill_group, reap_group, start_process

FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 60.0
SETTLED_S = 60.0
STOP_TIMEOUT_S = 30.0
PROGRESS_INTERVAL_S = 10.0
"""Between two looks at what a child that starts is doing, once it says so."""
QUIET_S = 20.0
"""So long may a starting child tell nothing before the end of its log is shown for it."""
MAX_EARLY_ENDS = 3
"""So often may a child end before it first serves."""
TAIL_BYTES = 64 * 1024
LINE_CHARACTERS = 300

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""What would change the terminal: colours and other control characters, except ends of lines."""
_PREFIX = re.compile(r"(?:\([^)]*pid=\d+\) ?)?(?P<level>(?:ERROR|CRITICAL) \S+ \S+ \[[^\]]*\] ?)?")
_ERROR = re.compile(r"[\w.]*(?:Error|Exception|Exit)\b|.*(?:\berror: |\bERROR\b|\bpanicked at )")
_ELSEWHERE = re.compile(r"root cause|\babove\b")


@dataclass
class Child:
    """One process that is kept running, until it `is_given_up`: another start would end alike.

    Args:
        name: for the terminal.
        command: what to run.
        log: file for its output.
        is_ready: asks whether it serves.
        progress: asks what it does while it starts; empty while it cannot tell. A child that ends by
            itself before it could tell has wrong settings.
        environment: added to ours.
        obstacle: asks what would keep it from serving; it is not started while there is something.
        end_signal: what it ends on.
        start: starts its process, as `start_process`.
        start_timeout_s: so long may it take to serve; then it hangs, is ended and started again.
        drain_s: so long may it take to finish what it serves, once it is told to end.
        place: its role and URL, for the terminal, where it has one of several roles.
    """

    name: str
    command: Callable[[], list[str]]
    log: Path
    is_ready: Callable[[], bool]
    progress: Callable[[], str]
    environment: dict[str, str] = field(default_factory=dict)
    obstacle: Callable[[], str] = str
    end_signal: signal.Signals = signal.SIGINT
    start: Callable[[list[str], BinaryIO, Mapping[str, str]], Process] = start_process
    start_timeout_s: float = math.inf
    drain_s: float = 0.0
    place: str = ""
    state: str = "waiting"
    doing: str = ""
    failure: str = ""
    num_restarts: int = 0
    is_given_up: bool = False
    process: Process | None = None
    _has_begun: bool = False
    _has_served: bool = False
    _backoff_s: float = field(default_factory=lambda: FIRST_BACKOFF_S)
    _start_at: float = field(default_factory=time.monotonic)
    _ready_since: float | None = None
    _has_died: bool = False
    _progress_at: float = 0.0
    _quiet_at: float = 0.0
    _said: str = ""
    _serves_by: float = math.inf
    _ends_by: float = math.inf
    _log_start: int = 0

    def poll(self) -> bool:
        """Look after it; returns whether there is news: of its state, or of what it does."""
        before = self.state, self.doing
        if self.process is None:
            if time.monotonic() >= self._start_at:
                self._try_to_start()
        elif self.process.poll() is not None:
            self._note_end()
        elif self.is_ready():
            self._ready_since = self._ready_since or time.monotonic()
            self._has_begun = self._has_served = True
            self.state, self.doing = "serving", ""
        elif self.state == "serving":
            self.state = "not serving"
        elif self.state == "starting" and time.monotonic() >= self._serves_by:
            self._give_this_start_up()
        elif self.state == "starting" and time.monotonic() >= self._progress_at:
            self._look_at_progress()
        return (self.state, self.doing) != before

    def _look_at_progress(self) -> None:
        if doing := self.progress():
            self._has_begun = True
            self.doing = self._said = doing
            self._progress_at = time.monotonic() + PROGRESS_INTERVAL_S
        elif time.monotonic() >= self._quiet_at:
            self.doing = last_line(self.tail())
            self._quiet_at = time.monotonic() + PROGRESS_INTERVAL_S  # and asks on meanwhile

    def _try_to_start(self) -> None:
        if obstacle := self.obstacle():
            self._wait_for_next_start("cannot start, tries", obstacle)
            self.is_given_up = self._ends_too_often
        else:
            self._start()

    def _start(self) -> None:
        with self.log.open("ab") as output:
            self._log_start = output.tell()
            self.process = self.start(self.command(), output, os.environ | self.environment)
        self.state, self.failure, self._progress_at, self._said = "starting", "", 0.0, ""
        self._quiet_at = time.monotonic() + QUIET_S
        self._serves_by = time.monotonic() + self.start_timeout_s

    def _give_this_start_up(self) -> None:
        """End a child that hangs, say what is known of it, and start it again after a while."""
        assert self.process is not None
        silent = self._said and f"says nothing any more, and last: {self._said}"
        known = (self.progress() or silent, last_line(self.tail()))
        self._kill_group()
        self.process.wait()
        self.process = None
        self._wait_for_next_start(
            "hung and was ended, starts",
            "; ".join([f"did not serve within {self.start_timeout_s:g} s", *filter(None, known)]),
        )
        self.is_given_up = self._ends_too_often

    def _note_end(self) -> None:
        """Remove what a dead child left, and start it again after a while."""
        assert self.process is not None
        code = self.process.wait()
        self._kill_group()
        reap_group(self.process.pid)
        self.process = None
        if self._ready_since is not None and time.monotonic() - self._ready_since > SETTLED_S:
            self._backoff_s, self._has_died = FIRST_BACKOFF_S, False
        at_once = self._ready_since is not None and not self._has_died
        self._has_died = True
        # What is killed with -9 has no time to say why: an older error would mislead.
        failure = "" if code == -signal.SIGKILL else last_error(self.tail())
        self._wait_for_next_start(f"{_ending(code)}, starts", failure, at_once=at_once)
        self._ready_since = None
        self.is_given_up = self._ends_too_often or (code >= 0 and not self._has_begun)

    @property
    def _ends_too_often(self) -> bool:
        return not self._has_served and self.num_restarts >= MAX_EARLY_ENDS

    def _wait_for_next_start(self, state: str, failure: str, at_once: bool = False) -> None:
        wait_s = 0.0 if at_once else self._backoff_s
        self._start_at = time.monotonic() + wait_s
        self.state = f"{state} again in {wait_s:g} s"
        self.doing, self.failure = "", failure
        if not at_once:
            self._backoff_s = min(2 * self._backoff_s, LONGEST_BACKOFF_S)
        self.num_restarts += 1

    def tail(self) -> str:
        """Return the end of what it wrote since it was last started."""
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - TAIL_BYTES))
            return log.read().decode(errors="replace")
        return ""

    def ask_to_end(self) -> None:
        """Send it its `end_signal`; `stop` waits so long for it to end by itself."""
        has_requests = self.state in ("serving", "not serving")
        self._ends_by = time.monotonic() + STOP_TIMEOUT_S + has_requests * self.drain_s
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(self.end_signal)

    def stop(self) -> None:
        """Return when nothing of it is left; kill what does not end in time."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=max(0.0, self._ends_by - time.monotonic()))
            self._kill_group()
            self.process.wait()
            reap_group(self.process.pid)

    def _kill_group(self) -> None:
        assert self.process is not None
        kill_group(self.process.pid)


def _ending(code: int) -> str:
    return f"ended with {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def last_line(log: str) -> str:
    """Return the last line of a log, for a terminal."""
    lines = _CONTROL.sub("", log).split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return said and f"last wrote: {said[:LINE_CHARACTERS]}"


def last_error(log: str) -> str:
    """Return the last line of a log that looks like an error, without its prefix; empty if none does.

    A line that only points to another one counts where there is no other.
    """
    pointers = []
    for line in reversed(_CONTROL.sub("", log).splitlines()):
        prefix = _PREFIX.match(line)
        assert prefix is not None  # it matches the empty string
        text = line[prefix.end() :].rstrip()
        if text.startswith((" ", "Traceback ")) or not (prefix["level"] or _ERROR.match(text)):
            continue
        if not _ELSEWHERE.search(text):
            return text[:LINE_CHARACTERS]
        pointers.append(text[:LINE_CHARACTERS])
    return pointers[0] if pointers else ""

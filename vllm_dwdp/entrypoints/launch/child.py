"""A process that is kept running: started again with back-off when it dies, ended when we end.

It is a process group of its own, so that whatever a dead server left behind is removed before its
successor starts. What it prints goes to a log, of which the last error is told.
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 60.0
SETTLED_S = 60.0
STOP_TIMEOUT_S = 30.0
MAX_EARLY_ENDS = 3
"""So often may a child end before it first serves."""
TAIL_BYTES = 64 * 1024
LINE_CHARACTERS = 300
PR_SET_PDEATHSIG = 1

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""What would change the terminal: colours and other control characters, except ends of lines."""
_PREFIX = re.compile(r"(?:\([^)]*pid=\d+\) ?)?(?P<level>(?:ERROR|CRITICAL) \S+ \S+ \[[^\]]*\] ?)?")
_ERROR = re.compile(r"[\w.]*(?:Error|Exception|Exit)\b|.*(?:\berror: |\bERROR\b|\bpanicked at )")
_ELSEWHERE = re.compile(r"root cause|\babove\b")


@dataclass
class Child:
    """One process that is kept running, until it `is_hopeless`: another start would end alike.

    Args:
        name: for the terminal.
        command: what to run.
        log: file for its output.
        is_alive: asks whether its port answers at all.
        is_ready: asks whether it serves.
        environment: added to ours.
    """

    name: str
    command: Callable[[], list[str]]
    log: Path
    is_alive: Callable[[], bool]
    is_ready: Callable[[], bool]
    environment: dict[str, str] = field(default_factory=dict)
    state: str = "waiting"
    failure: str = ""
    num_restarts: int = 0
    is_hopeless: bool = False
    process: subprocess.Popen[bytes] | None = None
    _has_answered: bool = False
    _has_served: bool = False
    _backoff_s: float = field(default_factory=lambda: FIRST_BACKOFF_S)
    _start_at: float = field(default_factory=time.monotonic)
    _ready_since: float | None = None
    _log_start: int = 0

    def poll(self) -> bool:
        """Look after it; returns whether its state changed."""
        before = self.state
        if self.process is None:
            if time.monotonic() >= self._start_at:
                self._start()
        elif self.process.poll() is not None:
            self._bury()
        elif self.is_ready():
            self._ready_since = self._ready_since or time.monotonic()
            self._has_answered = self._has_served = True
            self.state = "serving"
        elif not self._has_answered:
            self._has_answered = self.is_alive()
        elif self.state == "serving":
            self.state = "not serving"
        return self.state != before

    def _start(self) -> None:
        with self.log.open("ab") as output:
            self._log_start = output.tell()
            self.process = subprocess.Popen(
                self.command(),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment,
                start_new_session=True,
                preexec_fn=ending_with(os.getpid()),  # noqa: PLW1509 - we have one thread
            )
        self.state, self.failure = "starting", ""

    def _bury(self) -> None:
        """It died: remove what it left, and start it again after a while."""
        assert self.process is not None
        code = self.process.returncode
        self._kill_group()
        self.process = None
        settled = self._ready_since is not None and (
            time.monotonic() - self._ready_since > SETTLED_S
        )
        self._backoff_s = FIRST_BACKOFF_S if settled else self._backoff_s
        self._start_at = time.monotonic() + self._backoff_s
        self.state = f"{_ending(code)}, starts again in {self._backoff_s:g} s"
        # What is killed with -9 has no time to say why: an older error would mislead.
        self.failure = "" if code == -signal.SIGKILL else last_error(self.tail())
        self._backoff_s = min(2 * self._backoff_s, LONGEST_BACKOFF_S)
        self._ready_since = None
        self.num_restarts += 1
        self.is_hopeless = not self._has_served and (
            self.num_restarts >= MAX_EARLY_ENDS or (code >= 0 and not self._has_answered)
        )

    def tail(self) -> str:
        """The end of what it wrote since it was last started."""
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - TAIL_BYTES))
            return log.read().decode(errors="replace")
        return ""

    def stop(self) -> None:
        """Ask it to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Return when nothing of it is left."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=STOP_TIMEOUT_S)
            self._kill_group()
            self.process.wait()

    def _kill_group(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def ending_with(parent: int) -> Callable[[], None]:
    """For `preexec_fn`: the child gets SIGTERM when its parent ends, also by SIGKILL.

    Args:
        parent: the process id of the caller, whose main thread must be the one that forks.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = (ctypes.c_int, ctypes.c_ulong)

    def ask_the_kernel() -> None:
        # Until exec our own handler is in place, and would swallow the signal.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it had ended before the kernel was asked
            os._exit(128 + signal.SIGTERM)

    return ask_the_kernel


def _ending(code: int) -> str:
    return f"ended with {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def last_error(log: str) -> str:
    """The last line of a log that looks like an error, without its prefix; empty if none does.

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

"""How a child process begins: no signal is ignored in it, and it ends when its parent does.

A signal that is ignored stays ignored across exec. Shells start background jobs of scripts with SIGINT
ignored, and nohup ignores SIGHUP: without a reset a server that such a job starts could not be
interrupted. Start the child in a session of its own too (`start_new_session`): then neither the
terminal's Ctrl-C nor its hang-up reaches it, only what its parent decides.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, Protocol

import psutil

ENDING_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
REAP_TIMEOUT_S = 1.0
TRACKER = "multiprocessing.resource_tracker"
"""In the command line of the process by which Python removes shared memory of processes that died."""
TRACKER_TIMEOUT_S = 2.0


class Process(Protocol):
    """A child process, as `subprocess.Popen` shows it."""

    pid: int

    @property
    def returncode(self) -> int | None:
        """Its exit code, once `poll` or `wait` has seen its end; negative for a signal."""

    def poll(self) -> int | None:
        """Look whether it has ended; its exit code, or None."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; its exit code.

        Raises:
            subprocess.TimeoutExpired: it has not ended.
        """

    def send_signal(self, sig: int) -> None:
        """Send it a signal, unless its end has been seen."""


def start_process(
    command: list[str], output: BinaryIO, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, which ends with us.

    Args:
        command: of it.
        output: file for what it prints.
        environment: all of it.
    """
    return subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        preexec_fn=ending_with(os.getpid()),  # noqa: PLW1509 - it takes no lock
    )


class ForkedProcess:
    """A child of this process that another process forked for it.

    Args:
        pid: of the child.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """As `Process.poll`."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As `Process.wait`."""
        if self.poll() is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                ended = select.select([pidfd], [], [], timeout)[0]
            finally:
                os.close(pidfd)
            if not ended:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, sig: int) -> None:
        """As `Process.send_signal`."""
        if self.poll() is None:
            os.kill(self.pid, sig)


def kill_group(group: int) -> None:
    """Kill what is left of a process group.

    Resource trackers come last: once the others are dead, they remove the shared memory that these leave
    (vLLM's queues to workers), and end by themselves.
    """
    trackers = []
    for member in _members(group):
        with contextlib.suppress(psutil.NoSuchProcess):
            if is_tracker(member):
                trackers.append(member)
                member.resume()  # it may be stopped, as all of its group
            else:
                member.kill()
    deadline = time.monotonic() + TRACKER_TIMEOUT_S
    while any(map(_runs, trackers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _members(group: int) -> Iterator[psutil.Process]:
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(pid) == group:
                yield psutil.Process(pid)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def is_tracker(process: psutil.Process) -> bool:
    """Whether it is a resource tracker of Python's."""
    try:
        return TRACKER in " ".join(process.cmdline())
    except psutil.ZombieProcess:
        return False


def reap_group(group: int) -> None:
    """Take the exit codes of what was left in a process group that has been killed.

    A process that adopts orphans (`subreaper`) must; for any other one this does nothing. The leader's
    own exit code has been taken.
    """
    deadline = time.monotonic() + REAP_TIMEOUT_S
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-group, os.WNOHANG)[0] == 0:
                time.sleep(0.01)


def ending_with(parent: int) -> Callable[[], None]:
    """Make the `preexec_fn` of a child that gets SIGTERM when its parent ends, also by SIGKILL.

    In the child `ENDING_SIGNALS` have their default effect, whatever the parent does with them.

    Args:
        parent: the process id of the caller, whose main thread must be the one that forks.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = (ctypes.c_int, ctypes.c_ulong)

    def begin() -> None:
        # Before the kernel is asked: until exec the parent's handler would swallow the signal.
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it had ended before the kernel was asked
            os._exit(128 + signal.SIGTERM)

    return begin

"""How `launch` starts its ranks: as forks of one process that has imported vLLM, or as programs.

Whatever is wrong with that process, ranks start as programs; when it dies, another one takes its place
beside them. It is not the ranks' parent (see `template`), so its death is nothing to them.
"""

import array
import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import BinaryIO

from vllm_dwdp.compat.frontend import loading
from vllm_dwdp.entrypoints.launch.process import (
    ForkedProcess,
    Process,
    ending_with,
    start_process,
)

PR_SET_CHILD_SUBREAPER = 36
ANSWER_TIMEOUT_S = 20.0
END_TIMEOUT_S = 10.0
DYING_S = 2.0
"""From the end of a process's socket to its own."""
VLLM_COMMAND = "vllm.entrypoints.cli.main:main"


class Template:
    """A running process that forks ranks; `close` ends it, and no rank.

    Args:
        log: for its output.
    """

    def __init__(self, log: Path) -> None:
        environment = os.environ | loading.expected(os.environ)
        environment.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would forbid to fork
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, log.open("ab") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "vllm_dwdp.entrypoints.launch.template",
                    str(theirs.fileno()),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                preexec_fn=ending_with(os.getpid()),  # noqa: PLW1509 - it takes no lock
            )
        self.is_ready = False

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Wait for its import of vLLM; whether it has ended now, one way or the other.

        Raises:
            ForkingError: it cannot fork, or has died.
        """
        if self.is_ready:
            return True
        with self._asking(timeout_s):
            try:
                answer = json.loads(self._control.recv(4096) or "{}")
            except TimeoutError:
                return False
        if "ready" not in answer:
            raise ForkingError(answer.get("refused", self._died()))
        self.is_ready = True
        return True

    def fork(self, command: list[str], output: BinaryIO, environment: Mapping[str, str]) -> Process:
        """Start a rank, as `start_process`.

        Raises:
            ForkingError: it cannot, or has died.
        """
        request = {
            "arguments": command,
            "environment": dict(environment),
            "folder": os.getcwd(),
            "parent": os.getpid(),
        }
        attached = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [output.fileno()]))]
        with self._asking(ANSWER_TIMEOUT_S):
            self._control.sendmsg([json.dumps(request).encode()], attached)
            answer = self._control.recv(64)
        if not answer:
            raise ForkingError(self._died())
        return ForkedProcess(int(json.loads(answer)))

    def close(self) -> None:
        """End it."""
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_TIMEOUT_S)
        self.process.kill()
        self.process.wait()

    @contextmanager
    def _asking(self, timeout_s: float) -> Iterator[None]:
        """While active, whatever else goes wrong with the socket is its death."""
        self._control.settimeout(timeout_s)
        try:
            yield
        except TimeoutError:
            raise
        except OSError as error:
            raise ForkingError(f"{self._died()} ({error})") from error

    def _died(self) -> str:
        try:
            return f"it ended with {self.process.wait(DYING_S)}"
        except subprocess.TimeoutExpired:
            return "it does not answer"


class ForkingError(Exception):
    """A template cannot fork a rank; the rank is started as a program."""


class Ranks:
    """Starts ranks: by a template, while there is one that can.

    Args:
        log: for the output of templates; None starts every rank as a program.
        report: called with one line whenever that changes.
    """

    def __init__(self, log: Path | None, report: Callable[[str], None]) -> None:
        self._log = log
        self._report = report
        self._template = None if log is None else Template(log)

    def close(self) -> None:
        """End the template; ranks go on. Idempotent."""
        if self._template is not None:
            self._template.close()
            self._template = None

    def wait_until_ready(self, interrupted: list[int]) -> None:
        """Wait until a template can fork, or cannot, or we are interrupted."""
        while self._template is not None and not interrupted:
            try:
                if self._template.wait_until_ready(timeout_s=0.2):
                    return
            except ForkingError as error:
                self._give_up(error)

    def start(
        self, command: list[str], output: BinaryIO, environment: Mapping[str, str]
    ) -> Process:
        """Start a rank, as `start_process`."""
        changed = loading.read_differently(os.environ, environment)
        if self._template is not None and not changed:
            try:
                if self._template.wait_until_ready(timeout_s=0.001):
                    return self._template.fork(command, output, environment)
            except (ForkingError, TimeoutError) as error:
                self._replace(error)
        return start_process(command, output, environment)

    def _give_up(self, error: Exception) -> None:
        """There is no use in another one: this one never could."""
        self._report(f"ranks start as programs of their own, not as forks: {error}")
        self.close()

    def _replace(self, error: Exception) -> None:
        """Drop a template that died: the next rank may find another one ready."""
        assert self._template is not None and self._log is not None
        if not self._template.is_ready:
            self._give_up(error)
            return
        self._report(f"the process that forks ranks is replaced: {error}")
        self._template.close()
        self._template = Template(self._log)


@contextmanager
def forked_ranks(log: Path | None, report: Callable[[str], None]) -> Iterator[Ranks]:
    """Start ranks as forks while active, or as programs if `log` is None.

    Orphans of this process's descendants become its children meanwhile: so forks become ours.
    """
    if log is not None:
        _adopt_orphans(True)
    ranks = Ranks(log, report)
    try:
        yield ranks
    finally:
        ranks.close()
        if log is not None:
            _adopt_orphans(False)


def is_vllm_of_ours(program: str) -> bool:
    """Whether a program is the `vllm` command of this environment, and nothing else of that name."""
    named = entry_points(group="console_scripts", name="vllm")
    beside = Path(sys.executable).with_name("vllm")
    return Path(program) == beside and {point.value for point in named} == {VLLM_COMMAND}


def _adopt_orphans(adopts: bool) -> None:
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = (ctypes.c_int, ctypes.c_ulong)
    prctl(PR_SET_CHILD_SUBREAPER, int(adopts))

"""A process that runs vLLM's own serving benchmark, as often as it is told.

`vllm bench serve` needs ten seconds of one core to import vLLM. A benchmark of many short rounds on
the cores that it measures cannot afford that, so this process imports it once and then runs the
function behind the command: one line of JSON arguments in, one line out when the run has ended.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_dwdp.entrypoints.launch.process import ending_with
from vllm_dwdp.errors import DwdpError

_DONE, _FAILED = "done", "failed"
_LOG_LINES = 20


class BenchClient:
    """One such process, bound to `cores`; a context manager that ends it.

    Args:
        cores: that it may run on.
        log: file for what `vllm bench serve` prints.
    """

    def __init__(self, cores: Sequence[int], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, ",".join(str(core) for core in cores)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,
                preexec_fn=ending_with(os.getpid()),  # noqa: PLW1509 - it takes no lock
            )

    def __enter__(self) -> "BenchClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if error is not None:  # nothing waits for what it runs
            self._process.terminate()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Return once vLLM is imported.

        Raises:
            DwdpError: the process ended.
        """
        self._answer()

    def begin(self, arguments: list[str]) -> None:
        """Start `vllm bench serve` with these arguments; `finish` waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()

    def finish(self, result: Path) -> dict[str, Any]:
        """Wait until the run has ended, and return its detailed result, as `vllm bench serve` wrote it.

        Args:
            result: the file that the arguments named.

        Raises:
            DwdpError: it failed, or answered fewer requests than it sent: failed ones take no time, so
                that figures without them would flatter. Shows the end of the log.
        """
        self._answer()
        found: dict[str, Any] = json.loads(result.read_text())
        sent = len(found["errors"])  # one text for each request, empty where it was answered
        if found["completed"] != sent:
            raise self._failure(f"{found['completed']} of {sent} requests were answered")
        return found

    def _answer(self) -> None:
        assert self._process.stdout is not None
        if (line := self._process.stdout.readline().strip()) != _DONE:
            raise self._failure(line or "its process ended")

    def _failure(self, what: str) -> DwdpError:
        """Quote the end of the log, whose folder goes with the benchmark."""
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return DwdpError(
            f"vllm bench serve failed ({what}). The end of its log, {self.log}:\n"
            + "\n".join(lines)
        )


def main() -> None:
    """Serve runs until standard input ends. What vLLM prints goes to standard error."""
    os.sched_setaffinity(0, {int(core) for core in sys.argv[1].split(",")})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as run
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: Any = FlexibleArgumentParser()
    add_cli_args(parser)
    print(_DONE, file=answers, flush=True)
    for line in sys.stdin:
        try:
            run(parser.parse_args(json.loads(line)))
            print(_DONE, file=answers, flush=True)
        except (Exception, SystemExit) as error:
            print(
                _FAILED,
                f"{type(error).__name__}: {error}".splitlines()[0],
                file=answers,
                flush=True,
            )


if __name__ == "__main__":
    main()

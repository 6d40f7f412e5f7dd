"""Asks questions in processes of their own, so that a crash or a hang is the end of one answer only.

The parent's side is `ask`; run as a module, this file is the child, which takes titles and says on its
standard output, in lines that begin with `MARK`, which question it begins and what it found.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_checks.questions import CASES, Case

ROOT = Path(__file__).parents[1]
MARK = "@@gpu_checks "
LIMIT_ENV = "GPU_CHECKS_LIMIT_S"
PR_SET_PDEATHSIG = 1
SHORTEST_S = 20.0
"""With less time left nothing is begun."""


@dataclass
class Result:
    """What became of a case.

    Args:
        word: `yes`, `NO`, `fact`, `bench`, `skip` or `NOT RUN`.
        text: what was found, or why nothing was.
        answered: whether the question itself returned an answer.
        output: what its process printed meanwhile.
        rows: measurements.
    """

    title: str
    tag: str
    question: str
    word: str = ""
    text: str = ""
    answered: bool = False
    seconds: float = 0.0
    output: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, case: Case) -> "Result":
        """Make the result of a case that has not ended."""
        return cls(title=case.title, tag=case.question.tag, question=case.question.text)

    def end(self, word: str, text: str) -> "Result":
        """Set what became of the case."""
        self.word, self.text = word, text
        return self

    def as_json(self) -> dict[str, Any]:
        """Return everything, for a file."""
        return asdict(self)


def emit_row(row: dict[str, Any]) -> None:
    """Hand a measurement to the parent, from within a question."""
    print(MARK + json.dumps({"row": row}), flush=True)


# --- the parent ----------------------------------------------------------------------------------


class Child:
    """A process that answers some cases, whose output comes line by line."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpu_checks.asking", *(case.title for case in cases)],
            cwd=ROOT,
            env=os.environ | {LIMIT_ENV: str(cases[0].question.limit_s)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def next_line(self, deadline: float) -> str | None:
        """Return the next line; None at the end.

        Raises:
            queue.Empty: there is none until the deadline.
        """
        return self._lines.get(timeout=max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """End it with everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(5)


def ask(cases: Sequence[Case], deadline: float) -> Iterator[Result]:
    """Yield what becomes of each case; they share a process until one of them ends it."""
    left = list(cases)
    while left:
        if deadline - time.monotonic() < SHORTEST_S:
            for case in left:
                yield Result.of(case).end("NOT RUN", "the budget of time is spent")
            return
        for result in _ask_together(tuple(left), deadline):
            left.pop(0)
            yield result


def _ask_together(cases: Sequence[Case], deadline: float) -> Iterator[Result]:
    """Yield results until one of them ends the process; at least one."""
    child = Child(cases)
    try:
        for number, case in enumerate(cases):
            result = _listen(child, case, deadline, is_last=number == len(cases) - 1)
            yield result
            if not result.answered:
                return
    finally:
        child.kill()


def _listen(child: Child, case: Case, deadline: float, *, is_last: bool) -> Result:
    """Listen to one case until it is answered, or for the last one until the process ends."""
    result, begun = Result.of(case), time.monotonic()
    limit, text, error = begun + case.question.limit_s, "", ""
    while True:
        try:
            line = child.next_line(min(limit, deadline))
        except queue.Empty:
            return _timed_out(result, case, deadline, begun)
        if line is None:
            break
        if not line.startswith(MARK):
            result.output += line
            continue
        said = json.loads(line.removeprefix(MARK))
        if "row" in said:
            result.rows.append(said["row"])
            limit = time.monotonic() + case.question.limit_s
        elif "found" in said:
            text, result.answered = said["found"], True
            if not is_last:
                break
        elif "error" in said:
            error = said["error"]
    result.seconds = round(time.monotonic() - begun, 1)
    code = child.process.wait() if line is None else 0
    if not error and code:
        died = f"died with {code}: " + " | ".join(result.output.strip().splitlines()[-4:])
        error = f"answered ({text}), then {died}" if result.answered else died
    if not error and not result.answered:
        error = "ended without an answer"
    word = {"fact": "fact", "bench": "bench", "must": "yes"}[case.question.tag]
    if error:
        result.answered = False
        word = "fact" if word == "fact" else "NO"
    return result.end(word, error or text)


def _timed_out(result: Result, case: Case, deadline: float, begun: float) -> Result:
    """Say whether the budget or the case's own time was over."""
    result.seconds = round(time.monotonic() - begun, 1)
    if time.monotonic() >= deadline:
        return result.end("NOT RUN", "cut, the budget of time is spent")
    text = f"no answer in {case.question.limit_s:.0f} s; it hangs"
    return result.end("fact" if case.question.tag == "fact" else "NO", text)


# --- the child -----------------------------------------------------------------------------------


def answer(case: Case) -> str:
    """Ask one question in this process."""
    module, _, name = case.question.function.partition(":")
    function = getattr(importlib.import_module(f"gpu_checks.{module}"), name)
    return str(function(case.argument) if case.argument else function())


def main() -> None:
    """Answer the titles of the command line; the first error ends the process."""
    faulthandler.enable()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # do not outlive a killed parent
    for title in sys.argv[1:]:
        try:
            said = {"found": answer(CASES[title])}
        except BaseException as error:
            traceback.print_exc()
            said = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
        sys.stderr.flush()
        print("\n" + MARK + json.dumps(said), flush=True)
        if "error" in said or CASES[title].question.breaks_context:
            os._exit(0)  # a faulted context may not survive a tidy exit


if __name__ == "__main__":
    main()

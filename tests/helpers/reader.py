"""A reader who types what a page shows, and what an answer must look like."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.helpers.documented import ROOT, Step, steps
from tests.helpers.waiting import wait_until
from vllm_dwdp.entrypoints.launch.ports import free_ports

PORT = "8000"
"""What pages say, and what `vllm serve` takes where they say nothing."""
START_TIMEOUT_S = 280
STEP_TIMEOUT_S = 280


def runs_alone(step: Step) -> bool:
    return step.language == "sh" and not step.is_server and not step.asks_a_server


def end_session(leader: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait(10)


class Reader:
    """Types the commands of a page: in a folder that looks like the checkout, or in an empty one.

    A server is interrupted, as by Ctrl-C, when the next one or a program with engines of its own is
    started, and at the end.

    Args:
        folder: where the commands are typed; empty.
        model: what stands for MODEL.
        installed: an environment that has a wheel of this package. None: that of the tests, and the
            package of the checkout.
    """

    def __init__(self, folder: Path, model: str, installed: Path | None = None) -> None:
        self._folder = folder
        self._environment = os.environ | {
            "PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_COLOR": "0",
            "COLUMNS": "200",
        }
        (folder / ".venv").symlink_to(installed or sys.prefix)
        if installed is None:
            for entry in {each.name for each in ROOT.iterdir()} - {".venv", ".git", "dist"}:
                (folder / entry).symlink_to(ROOT / entry)
            self._environment["PYTHONPATH"] = str(ROOT)
        else:
            self._environment.pop("PYTHONPATH", None)
        self._words = {"MODEL": model}
        self._server: subprocess.Popen[bytes] | None = None
        self._log = folder / "server.log"

    def type(self, step: Step) -> str:
        """Return what a step prints; a server has answered when this returns.

        Raises:
            AssertionError: it failed, and what it printed.
        """
        if step.is_server:
            return self._serve(step)
        text = self._filled_in(step.text)
        if step.language == "python":
            self.end()
            (self._folder / "typed.py").write_text(text)
            text = "python typed.py"
        typed = self._start(text, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            output, errors = (each.decode() for each in typed.communicate(timeout=STEP_TIMEOUT_S))
        finally:
            end_session(typed)
        # doctor ends with 1 where the machine has a problem, which is not the page's.
        allowed = {0, 1} if step.words[1:2] == ["doctor"] else {0}
        assert typed.returncode in allowed, f"{step}: {text}\n{output}\n{errors}"
        assert output.strip(), f"{step}: {text} printed nothing"
        return output

    def end(self) -> None:
        """Interrupt the server, as at a terminal.

        Raises:
            TimeoutExpired: it went on.
        """
        server, self._server = self._server, None
        if server is None:
            return
        try:
            os.killpg(server.pid, signal.SIGINT)
            server.wait(60)
        finally:
            end_session(server)

    def _start(self, text: str, **output: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            text,
            shell=True,
            cwd=self._folder,
            env=self._environment,
            start_new_session=True,
            **output,
        )

    def _filled_in(self, text: str) -> str:
        for word, meaning in self._words.items():
            text = text.replace(word, meaning)
        return text

    def _serve(self, step: Step) -> str:
        self.end()
        (port,) = free_ports(1)
        text = step.text if PORT in step.text else shlex.join([*step.words, "--port", PORT])
        self._words[PORT] = str(port)
        with self._log.open("wb") as log:
            command = f"exec {self._filled_in(text)}"
            self._server = self._start(command, stdout=log, stderr=subprocess.STDOUT)
        wait_until(lambda: self._has_answered(step), START_TIMEOUT_S)
        shown = self._log.read_text()
        if met := re.search(r"ranks meet at (unix://\S+?);", shown):
            self._words["unix:///folder"] = met[1]
        return shown

    def _has_answered(self, step: Step) -> bool:
        assert self._server is not None
        assert self._server.poll() is None, f"{step} ended:\n{self._log.read_text()[-5000:]}"
        question = {"model": self._words["MODEL"], "prompt": "Paris is", "max_tokens": 4}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._words[PORT]}/v1/completions",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
        except (urllib.error.URLError, ConnectionError):
            return False
        return bool(answer["usage"]["completion_tokens"] == question["max_tokens"])

    def follow(self, page: str) -> list[Step]:
        """Type what needs servers or engines, from top to bottom; return what was typed.

        Raises:
            AssertionError: a step failed, or its answer is none.
        """
        followed = [step for step in steps(ROOT / page) if not step.mark and not runs_alone(step)]
        for step in followed:
            shown = self.type(step)
            if step.words[:1] == ["curl"]:
                assert json.loads(shown)["choices"][0]["text"], shown
            if "status" in step.words:
                ranks = re.findall(r"^│ 0 +│ (\d+) ", shown, re.MULTILINE)
                assert ranks == ["0", "1"], shown
        return followed

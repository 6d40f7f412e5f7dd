"""The processes of the demo: `vllm-dwdp launch` with two ranks, and clients that ask them."""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openai
import psutil
import speaking_model

from vllm_dwdp.entrypoints.cli.status import find_ranks
from vllm_dwdp.entrypoints.launch.server import Server, ServerError

NUM_RANKS = 2
LOGS = Path(os.environ.get("DEMO_LOGS") or speaking_model.cache_folder() / "demo-logs")
LAUNCH = (sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "launch")
START_TIMEOUT_S = 280
Report = Callable[[str], None]


class Launch:
    """A running `vllm-dwdp launch` of two ranks; a context manager that ends it."""

    def __init__(self, model: Path) -> None:
        arguments = [str(model), "--ranks", str(NUM_RANKS), "--logs", str(LOGS)]
        arguments += ["--served-model-name", "demo", "--max-model-len", "1024", "--enforce-eager"]
        settings = {"COLUMNS": "400", "VLLM_LOGGING_COLOR": "0"}
        self.server = Server(arguments, LOGS / "launch.log", settings, program=LAUNCH)
        self._shown = 0

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stop()

    def new_lines(self) -> list[str]:
        """Return what launch has said since the last call.

        Raises:
            SystemExit: it has ended.
        """
        lines = self.server.log.read_text(errors="replace").splitlines()
        new, self._shown = lines[self._shown :], len(lines)
        try:
            self.server.is_ready()
        except ServerError as error:
            raise SystemExit(str(error)) from error
        return new

    def wait_until_all_serve(self, report: Report) -> None:
        """Report what launch says until every rank answers.

        Raises:
            SystemExit: it took too long.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            for line in self.new_lines():
                report(line)
                if line.startswith(f"all {NUM_RANKS} ranks serve"):
                    return
            time.sleep(0.25)
        raise SystemExit(f"the ranks did not serve within {START_TIMEOUT_S} s; see {LOGS}")

    @property
    def urls(self) -> list[str]:
        """Of each rank."""
        found = re.search(r"ranks will listen at (.*); each", self.server.log.read_text())
        assert found is not None
        return found[1].split(", ")

    def status(self) -> list[dict[str, Any]]:
        """Of each rank, as `vllm-dwdp status` shows it."""
        found = re.search(r"ranks meet at (\S+);", self.server.log.read_text())
        assert found is not None
        every = find_ranks(found[1], secret_file=None, group_size=NUM_RANKS, num_groups=1)
        return [entry for entry in every if entry["dwdp_rank"] in range(NUM_RANKS)]

    def front_end(self, rank: int) -> psutil.Process:
        """Return the process of a rank that launch started, and that leads its process group."""
        children = psutil.Process(self.server.process.pid).children()
        words = f"--data-parallel-rank {rank}"
        return next(child for child in children if words in " ".join(child.cmdline()))


class Client(threading.Thread):
    """Asks one rank question after question, and keeps what has been answered so far."""

    def __init__(self, url: str, questions: Sequence[str], max_tokens: int, repeat: bool = False):
        super().__init__(daemon=True)
        self.answers: list[list[str]] = []
        """Question, and answer so far."""
        self.num_tokens = 0
        self.seconds = 0.0
        self.failure = ""
        self._openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self._questions, self._max_tokens, self._repeat = questions, max_tokens, repeat
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        started = time.monotonic()
        try:
            while not self._ended.is_set():
                for question in self._questions:
                    self._ask(question)
                if not self._repeat:
                    break
        except openai.OpenAIError as error:
            self.failure = str(error)
        self.seconds = time.monotonic() - started

    def _ask(self, question: str) -> None:
        self.answers.append([question, ""])
        stream = self._openai.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": question}],
            max_tokens=self._max_tokens,
            temperature=0,
            stream=True,
        )
        for part in stream:
            if part.choices and (text := part.choices[0].delta.content):
                self.answers[-1][1] += text
                self.num_tokens += 1

    def end(self) -> None:
        """Let the running answer finish.

        Raises:
            SystemExit: a request failed.
        """
        self._ended.set()
        self.join(timeout=120)
        if self.failure:
            raise SystemExit(f"a request failed: {self.failure}")

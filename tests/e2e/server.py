"""A real `vllm serve`, its log, and plain HTTP."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

VLLM = str(Path(sys.executable).with_name("vllm"))
START_TIMEOUT_S = 300


class Server:
    """One `vllm serve`; `stop` ends it and returns its exit code."""

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
        port = arguments[arguments.index("--port") + 1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [VLLM, "serve", *arguments, "--host", "127.0.0.1"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
                | os.environ
                | environment,
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.tail()
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                self.get("/health")
                return
            time.sleep(0.5)
        raise AssertionError(f"no answer within {START_TIMEOUT_S} s:\n{self.tail()}")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return str(response.read().decode())

    def complete(self, rank: int | None = None, **body: Any) -> dict[str, Any]:
        """One completion, on rank `rank` of this server if given."""
        headers = {"Content-Type": "application/json"}
        if rank is not None:
            headers["X-data-parallel-rank"] = str(rank)
        body = {"model": "m", "temperature": 0, "max_tokens": 16, "return_token_ids": True} | body
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=180) as response:
            answer: dict[str, Any] = json.loads(response.read())
        return answer

    def tokens(self, prompt: str, **options: Any) -> list[int]:
        """Greedy token ids of one request."""
        choice = self.complete(prompt=prompt, ignore_eos=True, **options)["choices"][0]
        return list(choice["token_ids"])

    def metric(self, name: str, **labels: str) -> float | None:
        """The sum of a metric over all samples with these labels; None if there is no such sample."""
        values = [
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics"))
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(values) if values else None

    def processes(self, name: str = "") -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if name in " ".join(child.cmdline())]

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-8000:]

    def stop(self, sent: signal.Signals = signal.SIGINT) -> int:
        if self.process.poll() is not None:
            return int(self.process.returncode)
        family = self.processes()
        self.process.send_signal(sent)
        try:
            code = self.process.wait(timeout=60)
        finally:
            self.process.kill()
            alive = psutil.wait_procs(family, timeout=20)[1]
            for process in alive:
                process.kill()
        assert not alive, f"left behind: {alive}"
        return code


@contextlib.contextmanager
def serving(
    log: Path, model: str, *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """A ready server."""
    from tests.e2e.matrix import free_ports

    port = str(free_ports(1)[0])
    common = ["--served-model-name", "m", "--max-model-len", "2048", "--port", port]
    server = Server([model, *common, *arguments], log, environment or {})
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()

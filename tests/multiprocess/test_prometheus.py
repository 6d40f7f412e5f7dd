"""A real Prometheus reads the metrics of ranks and answers every question of the Grafana board.

Debian's package of Prometheus is downloaded and unpacked into a folder; nothing is installed.
"""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.test_grafana import panels
from vllm_dwdp.entrypoints.launch.ports import free_ports

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

EXPORTER = """
import sys, threading, time
from wsgiref.simple_server import WSGIRequestHandler, make_server
from prometheus_client import Counter, Histogram, make_wsgi_app
from vllm_dwdp.compat.frontend.metrics import RankMetrics

ranks = RankMetrics("m")
labels = ["model_name", "engine"]
sums = [
    Histogram(f"vllm:nixl_{name}", name, labels)
    for name in ("bytes_transferred", "xfer_time_seconds")
]
counts = [
    Counter(f"vllm:nixl_{name}", name, labels)
    for name in ("num_failed_transfers", "num_kv_expired_reqs")
]
metrics = make_wsgi_app()

class Quiet(WSGIRequestHandler):
    def log_message(self, *arguments):
        pass

def app(environ, start_response):
    # As text: to a Prometheus older than 3 the OpenMetrics format would name colons as underscores.
    return metrics(environ | {"HTTP_ACCEPT": "text/plain"}, start_response)

server = make_server("127.0.0.1", int(sys.argv[1]), app, handler_class=Quiet)
threading.Thread(target=server.serve_forever, daemon=True).start()
for second in range(600):
    for rank in (0, 1):
        ranks.update(rank, {
            "mode": "prefetch", "dwdp_rank": rank, "group_size": 2, "peers": {str(1 - rank): "ready"},
            "fetched_bytes": {str(1 - rank): 1000 * second}, "prefetch_wait_seconds": 0.01 * second,
            "late_prefetches": second, "steps": {"prefetch": 5 * second, "direct": second},
            "resident_expert_bytes": 7, "saved_bytes": 7, "rejoin_seconds": 3.5,
        })
        for histogram in sums:
            histogram.labels("m", str(rank)).observe(0.2)
        for counter in counts:
            counter.labels("m", str(rank)).inc()
    time.sleep(1)
"""
CONFIG = """
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: ranks
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the program."""
    if installed := shutil.which("prometheus"):
        return installed
    folder = tmp_path_factory.mktemp("prometheus")
    commands = ["apt-get download -q prometheus", "dpkg -x prometheus_*.deb ."]
    for command in commands:
        ended = subprocess.run(
            command, shell=True, cwd=folder, capture_output=True, text=True, check=False
        )
        if ended.returncode:
            pytest.skip(f"Debian's package of Prometheus cannot be had: {ended.stderr.strip()}")
    return str(folder / "usr" / "bin" / "prometheus")


@pytest.fixture(scope="module")
def url(prometheus: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a Prometheus that reads two ranks."""
    folder = tmp_path_factory.mktemp("scrape")
    ranks_port, port = free_ports(2)
    (folder / "prometheus.yml").write_text(CONFIG.format(port=ranks_port))
    commands = [
        [sys.executable, "-c", EXPORTER, str(ranks_port)],
        [
            prometheus,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
    ]
    with (folder / "log").open("wb") as log:
        started = [subprocess.Popen(each, stdout=log, stderr=log) for each in commands]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(timeout=30)


def ask(url: str, question: str) -> list[dict[str, Any]]:
    """Return what it finds now."""
    query = urllib.parse.urlencode({"query": question})
    with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=10) as response:
        found: list[dict[str, Any]] = json.load(response)["data"]["result"]
    return found


def test_every_question_of_the_board_has_an_answer(url: str) -> None:
    questions = {
        target["expr"]: target.get("legendFormat", "")
        for panel in panels()
        for target in panel["targets"]
    }
    assert len(questions) > 10
    deadline = time.monotonic() + 60
    answers: dict[str, list[dict[str, Any]]] = {}
    while missing := [question for question in questions if not answers.get(question)]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.5)
        try:
            answers |= {question: ask(url, question) for question in missing}
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except OSError:
            continue  # it does not listen yet
    for question, legend in questions.items():
        assert len(answers[question]) >= 2, f"{question} does not tell the ranks apart"
        for label in re.findall(r"{{(\w+)}}", legend):
            assert all(label in each["metric"] for each in answers[question]), (question, label)

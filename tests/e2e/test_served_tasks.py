"""Servers and batch runs for other requests than completions: vectors, scores, files of requests."""

import json
import os
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Checkpoints
from vllm_dwdp.entrypoints.cli.status import find_ranks
from vllm_dwdp.entrypoints.launch.server import VLLM, Server, serving

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.every_version,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

ALONE = ("--enforce-eager", "--max-num-seqs", "1", "--max-num-batched-tokens", "512")
DWDP = ("--distributed-executor-backend", "dwdp", "--data-parallel-size", "2")
PREFETCH = json.dumps({"dwdp": {"mode": "prefetch"}})
TEXTS = ["The capital of France is", "a", "Independent ranks read each other's experts", "x y z"]
ASKED: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": TEXTS},
    "/pooling": {"input": TEXTS, "task": "embed"},
    "/score": {"queries": TEXTS[0], "documents": TEXTS},
    "/v1/score": {"queries": TEXTS, "documents": TEXTS[::-1]},
    "/rerank": {"query": TEXTS[2], "documents": TEXTS},
    "/v2/rerank": {"query": TEXTS[1], "documents": TEXTS, "top_n": 2},
}


def answers(server: Server, rank: int | None = None) -> dict[str, Any]:
    """Return what each route answers, without names and times."""
    found = {}
    pinned = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    for path, body in ASKED.items():
        asked = json.dumps({"model": "m"} | body).encode()
        headers = {"Content-Type": "application/json"} | pinned
        request = urllib.request.Request(server.url + path, asked, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        found[path] = answer.get("data", answer.get("results"))
    return found


@pytest.mark.feature("Pooling over HTTP: `/v1/embeddings`, `/pooling`, `/score`, `/rerank`")
def test_vectors_scores_and_ranks_of_documents(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = checkpoints("qwen3_moe", 8)
    embeds = ("--runner", "pooling", "--convert", "embed", *ALONE)
    with serving(tmp_path / "stock.log", model, *embeds) as stock:
        expected = answers(stock)
    assert all(expected.values())
    assert len({round(each["score"], 3) for each in expected["/score"]}) > 2
    options = (*DWDP, "--additional-config", PREFETCH)
    with serving(tmp_path / "ranks.log", model, *embeds, *options) as server:
        for rank in (0, 1):
            assert answers(server, rank) == expected
        assert answers(server) == expected
        time.sleep(2.5)  # longer than two of the polls that fill the metrics
        for rank in ("0", "1"):
            fetched = server.metric("vllm:dwdp_fetched_bytes_total", engine=rank) or 0
            remote = server.metric("vllm:dwdp_remote_expert_bytes", engine=rank) or 0
            assert fetched > 5 * remote > 0


def batch(folder: Path, name: str, model: str, *arguments: str, **environment: str) -> Any:
    """Start `vllm run-batch` on a file of requests; the process and where it writes."""
    asked, written = folder / f"{name}.jsonl", folder / f"{name}.out.jsonl"
    body = {"model": "m", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    lines = []
    for number in range(12):
        message = {"role": "user", "content": f"{number} {TEXTS[number % len(TEXTS)]}"}
        request = {"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions"}
        lines.append(json.dumps(request | {"body": body | {"messages": [message]}}))
    asked.write_text("\n".join(lines) + "\n")
    command = [VLLM, "run-batch", "-i", str(asked), "-o", str(written), "--model", model]
    command += ["--served-model-name", "m", "--max-model-len", "512", *ALONE, *arguments]
    log = (folder / f"{name}.log").open("wb")
    with log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"} | environment,
        )
    return process, written


def contents(written: Path) -> dict[str, str]:
    """Return the answers by the names of the requests."""
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert all(line["error"] is None for line in lines), lines
    return {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in lines
    }


@pytest.mark.feature("`vllm run-batch` over several ranks")
def test_a_file_of_requests(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model, place = checkpoints("qwen3_moe", 8), f"unix://{tmp_path}/meet"
    stock, expected = batch(tmp_path, "stock", model)
    assert stock.wait(timeout=200) == 0, (tmp_path / "stock.log").read_text()[-4000:]
    config = json.dumps({"dwdp": {"mode": "prefetch", "rendezvous": place}})
    ranks, found = batch(tmp_path, "ranks", model, *DWDP, "--additional-config", config)
    seen: dict[int, dict[str, Any]] = {}
    try:
        while ranks.poll() is None:
            asked = find_ranks(place, secret_file=None, group_size=2, num_groups=1)
            seen |= {each["rank"]: each for each in asked if each.get("fetched_bytes")}
            time.sleep(0.05)
    finally:
        ranks.kill()
    log = (tmp_path / "ranks.log").read_text()
    assert ranks.returncode == 0, log[-4000:]
    assert contents(found) == contents(expected)
    assert len(set(contents(expected).values())) == 12
    assert sorted(seen) == [0, 1], log[-4000:]
    for status in seen.values():
        assert sum(status["fetched_bytes"].values()) > 10 * status["remote_expert_bytes"] > 0

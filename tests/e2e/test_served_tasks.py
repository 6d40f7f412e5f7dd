"""Servers and batch runs for other requests than completions: vectors, scores, files of requests."""

import json
import os
import subprocess
import time
import urllib.error
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


KEY = "sk-test"
MESSAGES = {"messages": [{"role": "user", "content": TEXTS[0]}]}
GREEDY = {"temperature": 0, "max_tokens": 40}
TOOL = {
    "name": "weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
TOOLS = {"tools": [{"type": "function", "function": TOOL}]}
WEATHER = {
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "max_tokens": 200,
}
CHATS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": MESSAGES | TOOLS | GREEDY | WEATHER,
    "/v1/responses": {"input": TEXTS[2], "temperature": 0, "max_output_tokens": 16},
    "/v1/messages": MESSAGES | GREEDY,
    "/v1/completions": {"prompt": TEXTS, "echo": True, "logprobs": 2} | GREEDY,
    "/tokenize": {"prompt": TEXTS[2]},
    "/detokenize": {"tokens": [5, 60, 7]},
}
NOT_COMPARED = {"id", "created", "created_at", "completed_at", "request_id", "system_fingerprint"}
"""Fields that are new with each request."""


def answers(
    server: Server, rank: int | None = None, asked: dict[str, dict[str, Any]] = ASKED
) -> dict[str, Any]:
    """Return what each route answers, without names and times."""
    found = {}
    pinned = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    for path, body in asked.items():
        content = json.dumps({"model": "m"} | body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"} | pinned
        request = urllib.request.Request(server.url + path, content, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            found[path] = compared(json.load(response))
    return found


def compared(answer: Any) -> Any:
    """Return the answer without what is new each time."""
    if isinstance(answer, dict):
        return {key: compared(each) for key, each in answer.items() if key not in NOT_COMPARED}
    return [compared(each) for each in answer] if isinstance(answer, list) else answer


def check_fetched(server: Server) -> None:
    """Assert that both ranks have fetched their remote experts."""
    time.sleep(2.5)  # longer than two of the polls that fill the metrics
    for rank in ("0", "1"):
        fetched = server.metric("vllm:dwdp_fetched_bytes_total", engine=rank) or 0
        remote = server.metric("vllm:dwdp_remote_expert_bytes", engine=rank) or 0
        assert fetched > 5 * remote > 0


@pytest.mark.feature("Pooling over HTTP: `/v1/embeddings`, `/pooling`, `/score`, `/rerank`")
def test_vectors_scores_and_ranks_of_documents(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = checkpoints("qwen3_moe", 8)
    embeds = ("--runner", "pooling", "--convert", "embed", *ALONE)
    with serving(tmp_path / "stock.log", model, *embeds) as stock:
        expected = answers(stock)
    assert all(expected.values())
    assert len({round(each["score"], 3) for each in expected["/score"]["data"]}) > 2
    options = (*DWDP, "--additional-config", PREFETCH)
    with serving(tmp_path / "ranks.log", model, *embeds, *options) as server:
        for rank in (0, 1):
            assert answers(server, rank) == expected
        assert answers(server) == expected
        check_fetched(server)


@pytest.mark.feature("Tool calls, `/v1/responses`, `/v1/messages`, `/tokenize`, API keys")
def test_tools_responses_and_keys(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = checkpoints("qwen3_moe", 8)
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--api-key", KEY)
    with serving(tmp_path / "stock.log", model, *tools, *ALONE) as stock:
        expected = answers(stock, asked=CHATS)
    (choice,) = expected["/v1/chat/completions"]["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert set(json.loads(call["function"]["arguments"])) == {"city", "unit"}
    options = (*DWDP, "--additional-config", PREFETCH)
    with serving(tmp_path / "ranks.log", model, *tools, *ALONE, *options) as server:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{server.url}/v1/models", timeout=60)
        for rank in (0, 1):
            assert answers(server, rank, CHATS) == expected
        check_fetched(server)


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

"""`vllm serve` with internal load balancing: two ranks, two API servers, compiled, in prefetch mode.

One server is shared by the tests of this module; they run in file order.
"""

import contextlib
import http.client
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import Checkpoints
from tests.helpers import weight_files
from tests.helpers.waiting import wait_until
from vllm_dwdp.entrypoints.launch.server import Server, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

DWDP = ("--distributed-executor-backend", "dwdp", "--data-parallel-size", "2")
SETTLED_S = 2.5
"""Longer than two of the polls that fill the metrics."""
SHAPE = {"hidden_size": 320, "moe_intermediate_size": 704, "num_hidden_layers": 4}
PROMPTS = [f"prompt {index} " * (1 + 7 * index) for index in range(6)]


@pytest.fixture(scope="module")
def model(checkpoints: Checkpoints) -> str:
    return checkpoints("qwen3_moe", 64, **SHAPE)


@pytest.fixture(scope="module")
def expected(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Stock vLLM with the same compilation, one request at a time."""
    log = tmp_path_factory.mktemp("stock") / "server.log"
    with serving(log, model, "--max-num-batched-tokens", "64") as server:
        return [server.tokens(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def server(
    model: str, expected: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("dwdp") / "server.log"
    config = json.dumps({"dwdp": {"mode": "prefetch"}})
    chunked = ("--max-num-batched-tokens", "64")
    arguments = (*DWDP, "--api-server-count", "2", "--additional-config", config, *chunked)
    transfer = ("--weight-transfer-config", json.dumps({"backend": weight_files.NAME}))
    environment = weight_files.environment() | {"VLLM_SERVER_DEV_MODE": "1"}
    with serving(log, model, *arguments, *transfer, environment=environment) as running:
        yield running


@pytest.mark.every_version
@pytest.mark.feature("`vllm serve --data-parallel-size N`, with several API servers")
@pytest.mark.feature("torch.compile")
def test_each_rank_answers_as_stock_vllm_does(server: Server, expected: list[list[int]]) -> None:
    assert len(server.processes("APIServer")) == 2
    for rank in (0, 1):
        assert [server.tokens(prompt, rank=rank) for prompt in PROMPTS] == expected


@pytest.mark.feature("Metrics of each rank on `/metrics`")
def test_metrics_tell_the_configuration_and_count_remote_bytes(server: Server) -> None:
    for engine in ("0", "1"):
        server.tokens("twelve steps", rank=int(engine), max_tokens=12)
        assert server.metric("vllm:dwdp_config_info", engine=engine, mode="prefetch") == 1
        resident = server.metric("vllm:dwdp_resident_expert_bytes", engine=engine)
        remote = server.metric("vllm:dwdp_remote_expert_bytes", engine=engine)
        assert resident and resident == remote, "two ranks, half the experts each"
        wait_until(lambda engine=engine, least=10 * remote: fetched_bytes(server, engine) > least)
        peer = "1" if engine == "0" else "0"
        assert server.metric("vllm:dwdp_peer_state", engine=engine, peer=peer, state="ready") == 1
        assert server.metric("vllm:dwdp_start_seconds", engine=engine, phase="load") > 0
        assert server.metric("vllm:dwdp_digested_bytes", engine=engine) >= resident
        assert server.metric("vllm:dwdp_prefetch_wait_seconds_total", engine=engine) is not None


def fetched_bytes(server: Server, engine: str) -> float:
    return server.metric("vllm:dwdp_fetched_bytes_total", engine=engine) or 0


@pytest.mark.feature("Ranks that do not wait for each other")
def test_one_rank_runs_a_thousand_steps_while_the_other_runs_none(server: Server) -> None:
    before = settled_steps(server)
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(
            lambda index: server.tokens(f"thousand {index}", rank=1, max_tokens=600), range(2)
        ):
            pass
        server.tokens("and some more", rank=1, max_tokens=600)
    after = settled_steps(server)
    assert after[0] - before[0] == 0, "the idle rank ran steps: it is not independent"
    assert after[1] - before[1] >= 1000


def settled_steps(server: Server) -> list[int]:
    """Return both ranks' steps, once they have stood still for longer than metrics lag."""
    seen, since = [-1, -1], time.monotonic()
    deadline = time.monotonic() + 20
    while time.monotonic() - since < SETTLED_S:
        assert time.monotonic() < deadline, f"ranks without requests still run: {seen}"
        now = [steps(server, rank) for rank in ("0", "1")]
        if now != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.1)
    return seen


def steps(server: Server, engine: str) -> int:
    return int(server.metric("vllm:dwdp_steps_total", engine=engine) or 0)


@pytest.mark.feature("Streaming, and clients that hang up")
def test_aborted_requests_leave_the_ring_in_order(
    server: Server, expected: list[list[int]]
) -> None:
    for index in range(8):
        abandon_stream(server, f"abandoned {index} " * 20)
    for rank in (0, 1):
        assert [server.tokens(prompt, rank=rank) for prompt in PROMPTS] == expected


def abandon_stream(server: Server, prompt: str) -> None:
    """Start a streaming completion and hang up after its first bytes."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    body = {"model": "m", "prompt": prompt, "max_tokens": 500, "stream": True, "ignore_eos": True}
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    with contextlib.suppress(http.client.HTTPException):
        connection.getresponse().read(20)
    connection.close()


def test_many_at_once_reach_both_ranks(server: Server) -> None:
    before = settled_steps(server)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda index: server.tokens(f"at once {index}"), range(32)))
    assert all(len(answer) == 16 for answer in answers)
    for rank in (0, 1):
        wait_until(lambda rank=rank: steps(server, str(rank)) > before[rank])


def test_the_log_says_what_each_rank_holds(server: Server) -> None:
    log = server.log.read_text()
    for rank in (0, 1):
        assert log.count(f"DWDP rank {rank} serves in prefetch mode (mode 'prefetch' was") == 1


def test_expert_memory_is_stored_once(server: Server) -> None:
    """Summed proportional set size of what ranks share: the experts once, and the slots."""
    shared = sum(proportional_memfd_bytes(rank.pid) for rank in server.ranks())
    experts = server.metric("vllm:dwdp_resident_expert_bytes") or 0
    slots = server.metric("vllm:dwdp_slot_bytes") or 0
    assert experts > 0 and slots > 0
    assert 0.95 * (experts + slots) <= shared <= 1.05 * (experts + slots), (shared, experts, slots)


@pytest.mark.slow
@pytest.mark.feature("/pause, /resume, /sleep, /wake_up, /collective_rpc")
def test_new_weights_and_sleep_over_http(
    server: Server, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    new = checkpoints("qwen3_moe", 64, seed=1, **SHAPE)
    with serving(tmp_path / "stock.log", new, "--max-num-batched-tokens", "64") as stock:
        renewed = [stock.tokens(prompt) for prompt in PROMPTS[:3]]
    post(server, "/pause")
    assert json.loads(server.get("/is_paused")) == {"is_paused": True}
    post(server, "/collective_rpc", method="reload_weights", kwargs={"weights_path": new})
    post(server, "/resume")
    for rank in (0, 1):
        assert [server.tokens(prompt, rank=rank) for prompt in PROMPTS[:3]] == renewed
        wait_until(
            lambda rank=rank: server.metric("vllm:dwdp_weight_update", engine=str(rank)) == 1
        )
    for level in (1, 2):
        post(server, f"/sleep?level={level}")
        assert json.loads(server.get("/is_sleeping")) == {"is_sleeping": True}
        post(server, "/wake_up")
        assert server.tokens(PROMPTS[0], rank=1) == renewed[0]


@pytest.mark.slow
@pytest.mark.feature("weight transfer (start, update, finish)")
def test_a_trainer_sends_weights_over_http(
    server: Server, expected: list[list[int]], model: str
) -> None:
    """Back to the first weights, a chunk at a time; each request reaches every rank."""
    before = server.metric("vllm:dwdp_weight_update", engine="0") or 0
    post(server, "/pause")
    post(server, "/init_weight_transfer_engine", init_info={})
    post(server, "/start_weight_update")
    for parts in weight_files.parts_of(model):
        post(server, "/update_weights", update_info={"folder": model, "parts": parts})
    post(server, "/finish_weight_update", weight_version="step 8")
    post(server, "/reset_prefix_cache")
    post(server, "/resume")
    assert json.loads(server.get("/weight_info")) == {"weight_version": "step 8"}
    for rank in (0, 1):
        assert [server.tokens(prompt, rank=rank) for prompt in PROMPTS] == expected
        wait_until(
            lambda rank=rank: (
                server.metric("vllm:dwdp_weight_update", engine=str(rank)) == before + 1
            )
        )


def post(server: Server, path: str, **content: object) -> None:
    request = urllib.request.Request(
        server.url + path,
        data=json.dumps(content).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.status == 200, answer.read()


@pytest.mark.feature("Mode `replica`: whole copies on independent ranks")
@pytest.mark.slow
def test_replicas_answer_as_stock_vllm_does_and_say_so(
    model: str, expected: list[list[int]], tmp_path: Path
) -> None:
    replica = json.dumps({"dwdp": {"mode": "replica"}})
    chunked = ("--max-num-batched-tokens", "64")
    log = tmp_path / "server.log"
    with serving(log, model, *DWDP, "--additional-config", replica, *chunked) as replicas:
        for rank in (0, 1):
            assert [replicas.tokens(prompt, rank=rank) for prompt in PROMPTS] == expected
        wait_until(lambda: replicas.metric("vllm:dwdp_config_info", mode="replica") == 2)
        names = {process.cmdline()[0] for process in replicas.processes("VLLM::")}
        assert names == {"VLLM::EngineCore_DP0", "VLLM::EngineCore_DP1"}, (
            "one API server by default"
        )
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda index: replicas.tokens(f"at once {index}"), range(32)))
        assert all(len(answer) == 16 for answer in answers)
        for rank in ("0", "1"):
            finished = replicas.metric("vllm:request_success_total", engine=rank) or 0
            assert finished >= len(PROMPTS) + 12, "requests are spread over the ranks"


def proportional_memfd_bytes(pid: int) -> int:
    """Proportional set size of the mappings of shards and slots, composites included."""
    total, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = "memfd:dwdp" in line
        elif ours and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total

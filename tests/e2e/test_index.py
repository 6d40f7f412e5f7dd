"""Two ranks that are servers of their own are told apart by whatever vLLM derives from their index."""

import json
import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Checkpoints
from vllm_dwdp.entrypoints.launch.ports import free_ports_in_a_row
from vllm_dwdp.entrypoints.launch.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NUM_RANKS = 2


@pytest.fixture(scope="module")
def ranks(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    """Both with the same arguments but the rank, as `launch` starts them; vLLM keeps ports apart."""
    folder = tmp_path_factory.mktemp("index")
    config = json.dumps({"dwdp": {"rendezvous": f"unix://{folder}/meet"}})
    endpoint = f"tcp://*:{free_ports_in_a_row(NUM_RANKS)}"
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    servers = [
        Server(
            [
                checkpoints("qwen3_moe"),
                *("--enforce-eager", "--served-model-name", "m", "--max-model-len", "512"),
                *("--distributed-executor-backend", "dwdp", "--additional-config", config),
                *("--data-parallel-size", str(NUM_RANKS), "--data-parallel-rank", str(rank)),
                *("--kv-events-config", json.dumps(events)),
            ],
            folder / f"rank{rank}.log",
            {"VLLM_SERVER_DEV_MODE": "1"},
        )
        for rank in range(NUM_RANKS)
    ]
    try:
        for server in servers:
            server.wait_until_ready()
        yield servers
    finally:
        for server in servers:
            server.stop()
    assert not list((folder / "meet").iterdir())


@pytest.mark.feature("Sampling without a seed")
def test_samples_without_a_seed_differ_between_ranks(ranks: list[Server]) -> None:
    """Best-of-n over two ranks would lose half of its samples."""
    prompt = "The capital of France is"
    assert ranks[0].tokens(prompt) == ranks[1].tokens(prompt), "greedy"
    seeded = [server.tokens(prompt, temperature=1.0, seed=7) for server in ranks]
    assert seeded[0] == seeded[1]
    drawn = [server.tokens(prompt, temperature=1.0) for server in ranks]
    assert drawn[0] != drawn[1]


def test_metrics_and_server_info_say_the_global_rank(ranks: list[Server]) -> None:
    time.sleep(2.5)
    for rank, server in enumerate(ranks):
        other = str(1 - rank)
        for name in ("vllm:dwdp_config_info", "vllm:generation_tokens_total"):
            assert server.metric(name, engine=str(rank)), name
            assert server.metric(name, engine=other) is None, name
        shown = json.loads(server.get("/server_info?config_format=json"))
        parallel = shown["vllm_config"]["parallel_config"]
        assert parallel["data_parallel_size"] == NUM_RANKS
        assert parallel["data_parallel_rank"] == parallel["data_parallel_index"] == rank
        assert parallel["data_parallel_external_lb"] is True


def test_a_request_for_another_rank_is_refused_as_in_stock_vllm(ranks: list[Server]) -> None:
    for server in ranks:
        server.tokens("a", rank=0)
        with pytest.raises(OSError, match="400"):
            server.tokens("a", rank=1)

"""Ranks started node by node (hybrid load balancing), in several groups.

Ranks started one by one: `test_survival`.
"""

import copy
import json
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.engine_process import PROMPTS as STOCK_PROMPTS
from tests.helpers.waiting import wait_until
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = [f"topology {index} " * (1 + 5 * index) for index in range(4)]
EAGER = ("--enforce-eager", "--served-model-name", "m")


def start(model: str, log: Path, folder: Path, *arguments: str, **dwdp: object) -> Server:
    config = json.dumps({"dwdp": {"rendezvous": f"unix://{folder}"} | dwdp})
    backend = ("--distributed-executor-backend", "dwdp", "--additional-config", config)
    return Server([model, *arguments, *backend], log, {})


@pytest.mark.feature("Hybrid load balancing (`--data-parallel-hybrid-lb`)")
def test_hybrid_nodes_with_one_group_each(
    stock: StockEngine, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Four ranks, two front ends, groups of two: the second node's ranks are 2 and 3."""
    model, folder = checkpoints("mixtral", 8), tmp_path / "meet"
    expected = stock(model)["tokens"]
    nodes = [
        start(
            model,
            tmp_path / f"node{node}.log",
            folder,
            *EAGER,
            *("--max-model-len", "512", "--data-parallel-size", "4"),
            *("--data-parallel-size-local", "2", "--data-parallel-start-rank", str(2 * node)),
            *("--data-parallel-hybrid-lb", "--max-num-seqs", "1", "--max-num-batched-tokens", "64"),
            group_size=2,
        )
        for node in (0, 1)
    ]
    try:
        for node in nodes:
            node.wait_until_ready()
        for node in nodes:
            for rank in (0, 1):
                found = [node.tokens(each, rank=rank, max_tokens=12) for each in STOCK_PROMPTS]
                assert found == expected
            assert not node.processes("DPCoordinator") and not node.processes("APIServer")
        assert sorted(path.name for path in folder.iterdir()) == [
            "g0-r0.sock",
            "g0-r1.sock",
            "g1-r0.sock",
            "g1-r1.sock",
        ]
        log = nodes[1].log.read_text()
        assert "DWDP rank 2 serves" in log and "DWDP rank 3 serves" in log
        time.sleep(2.5)
        for number, (node, group) in enumerate(zip(nodes, ("0", "1"), strict=True)):
            assert node.metric("vllm:dwdp_config_info", group=group, group_size="2") == 2
            for rank in range(4):
                counted = node.metric("vllm:generation_tokens_total", engine=str(rank))
                assert bool(counted) == (rank // 2 == number), "labels are global ranks"
    finally:
        for node in nodes:
            node.stop()
    assert not list(folder.iterdir())


@pytest.mark.feature("One port for each rank (`--data-parallel-multi-port-external-lb`)")
def test_one_server_for_each_rank_under_vllms_supervisor(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """`--data-parallel-multi-port-external-lb`: rank r listens at port + r, beside a health port."""
    (health_port,) = free_ports(1)
    supervisor = start(
        checkpoints("mixtral", 8),
        tmp_path / "log",
        tmp_path / "meet",
        *("--enforce-eager", "--served-model-name", "m", "--max-model-len", "512"),
        *("--data-parallel-size", "2", "--data-parallel-size-local", "2"),
        *("--data-parallel-multi-port-external-lb",),
        *("--data-parallel-supervisor-port", str(health_port)),
    )
    second = copy.copy(supervisor)
    second.url = f"http://127.0.0.1:{supervisor.port + 1}"
    all_ready = copy.copy(supervisor)
    all_ready.url = f"http://127.0.0.1:{health_port}"
    with supervisor:
        all_ready.wait_until_ready()
        assert second.tokens(PROMPTS[2]) == supervisor.tokens(PROMPTS[2])
        for rank, server in enumerate((supervisor, second)):
            wait_until(lambda: server.metric("vllm:dwdp_config_info"))  # noqa: B023
            assert server.metric("vllm:dwdp_config_info", dwdp_rank=str(rank)) == 1
            counted = server.metric("vllm:generation_tokens_total", engine=str(rank))
            assert counted == 16, "labels are global ranks"
        assert supervisor.stop(signal.SIGTERM) == 0
    assert not list((tmp_path / "meet").iterdir())

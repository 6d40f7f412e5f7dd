"""What vLLM derives from a rank's index in every topology: what stock vLLM does, and nobody waits.

Real configs of `create_engine_config` go through vLLM's own start of an engine; only the processes are
missing.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.compat.front_ends import configure, run_engine_core, start
from vllm_dwdp.compat.frontend import balancing, coordinator, own_engines
from vllm_dwdp.compat.worker import independent

pytestmark = pytest.mark.usefixtures("nothing_stays_wrapped")

FIELDS = (
    "data_parallel_index",
    "data_parallel_rank",
    "data_parallel_rank_local",
    "data_parallel_size",
    "data_parallel_size_local",
    "data_parallel_external_lb",
    "data_parallel_hybrid_lb",
)


EXTERNAL = {"data_parallel_size": 4, "data_parallel_rank": 1}


HYBRID = {
    "data_parallel_size": 4,
    "data_parallel_size_local": 2,
    "data_parallel_start_rank": 2,
}


INTERNAL = {"data_parallel_size": 4}


TOPOLOGIES = {"external": EXTERNAL, "hybrid": HYBRID, "internal": INTERNAL}


SPMD = {"VLLM_DP_SIZE": "4", "VLLM_DP_RANK": "3", "VLLM_DP_RANK_LOCAL": "1"}


def facts(parallel: Any, fields: tuple[str, ...] = FIELDS) -> dict[str, Any]:
    return {name: getattr(parallel, name) for name in fields}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_front_end_says_of_itself_what_a_stock_one_does(
    model: str, tmp_path: Path, topology: str
) -> None:
    """`/server_info`, usage statistics and clients read it."""
    arguments = TOPOLOGIES[topology]
    ours = configure(model, tmp_path, **arguments).parallel_config
    assert facts(ours) == facts(configure(model, None, **arguments).parallel_config)


@pytest.mark.parametrize("num_servers", [1, 2])
@pytest.mark.parametrize("module", own_engines.LAUNCHING_MODULES)
@pytest.mark.parametrize(
    ("topology", "ranks", "local_only"),
    [("external", [1], True), ("hybrid", [2, 3], True), ("internal", [0, 1, 2, 3], False)],
)
def test_an_engine_has_its_global_index_and_its_front_end_waits_for_no_other(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    topology: str,
    ranks: list[int],
    local_only: bool,
    module: str,
    num_servers: int,
) -> None:
    config = configure(model, tmp_path, **TOPOLOGIES[topology])
    before = facts(config.parallel_config)
    engines, awaited = start(config, monkeypatch, module, num_servers)
    assert awaited == ranks
    assert facts(config.parallel_config) == before
    for local, (rank, engine) in enumerate(zip(ranks, engines, strict=True)):
        assert engine.engine_index == engine.parallel.data_parallel_index == rank
        assert engine.parallel.data_parallel_rank_local == local, "its device and local ports"
        assert engine.parallel.local_engines_only is local_only
        assert (engine.parallel.data_parallel_size, engine.parallel.data_parallel_rank) == (1, 0)
        assert independent.seat_of(engine.config).rank == rank


def test_the_config_of_an_engine_can_be_made_anew(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As drafters do; vLLM refuses a single rank behind an external load balancer."""
    from vllm.config.utils import replace

    (engine,), _ = start(configure(model, tmp_path, **EXTERNAL), monkeypatch)
    assert replace(engine.parallel).local_engines_only


def test_a_rank_in_spmd_style_keeps_its_index(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SPMD.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    config = configure(model, tmp_path)
    assert config.parallel_config.data_parallel_size == 1, "vLLM would wait for a wave to end"
    (engine,), awaited = start(config, monkeypatch)
    assert awaited == [engine.engine_index] == [3]
    assert engine.parallel.data_parallel_index == independent.seat_of(engine.config).rank == 3
    assert engine.parallel.data_parallel_rank_local == 1
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    in_process = configure(model, tmp_path)
    expected = {
        "data_parallel_index": 3,
        "data_parallel_rank": 0,
        "data_parallel_rank_local": 1,
        "data_parallel_size": 1,
    }
    assert facts(in_process.parallel_config, tuple(expected)) == expected
    assert independent.seat_of(in_process).rank == 3


def test_a_headless_node_forgets_its_own_ranks_when_it_ends(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", lambda run, *args: at_exit.append(lambda: run(*args)))
    arguments = {"data_parallel_size_local": 1, "data_parallel_start_rank": 1, "headless": True}
    place = tmp_path / "meet"
    config = configure(model, place, data_parallel_size=2, **arguments)
    launch = config.model_config.dwdp_launch
    assert [seat.rank for seat in launch.seats] == [1]
    engine = run_engine_core(config, 1, 0, monkeypatch)
    assert independent.seat_of(engine.config).rank == 1
    with launch.endpoint.listen(0, 0):
        killed = launch.endpoint.listen(0, 1)
        os.close(killed.detach())
        for run in at_exit:
            run()
        assert [path.name for path in place.iterdir()] == ["g0-r0.sock"]


def test_the_client_of_an_external_rank_listens_to_no_coordinator(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine import core_client

    made: list[str] = []
    for name in ("AsyncMPClient", "DPAsyncMPClient", "DPLBAsyncMPClient"):
        monkeypatch.setattr(core_client, name, lambda *args, name=name, **kwargs: made.append(name))
    monkeypatch.setattr(balancing, "OnlyClient", lambda *args, **kwargs: made.append("OnlyClient"))
    for arguments in TOPOLOGIES.values():
        config = configure(model, tmp_path, **arguments)
        make = core_client.EngineCoreClient.make_async_mp_client
        make(config, object, log_stats=False, client_addresses={})
    assert made == ["AsyncMPClient", "OnlyClient", "OnlyClient"]
    make(config, object, log_stats=False, client_addresses={"input_address": "in"})
    assert made[-1] == "DPLBAsyncMPClient", "one of several API servers"
    stock = configure(model, None, **EXTERNAL)
    core_client.EngineCoreClient.make_async_mp_client(stock, object, log_stats=False)
    assert made[-1] == "DPAsyncMPClient", "a stock engine of this process stays stock"


def test_seeds_and_ports_of_two_ranks_differ_as_stock_vllm_makes_them(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from vllm.distributed.kv_events import ZmqEventPublisher
    from vllm.utils.torch_utils import set_random_seed

    drawn, ports = [], []
    for rank in (0, 1):
        arguments = {"data_parallel_size": 2, "data_parallel_rank": rank}
        (engine,), _ = start(configure(model, tmp_path, **arguments), monkeypatch)
        index = engine.parallel.data_parallel_index
        set_random_seed(engine.config.model_config.seed, index)
        drawn.append(torch.rand(4).tolist())
        ports.append(ZmqEventPublisher.offset_endpoint_port("tcp://*:5557", index))
    assert drawn[0] != drawn[1]
    assert ports == ["tcp://*:5557", "tcp://*:5558"]


def test_the_coordinator_of_a_node_knows_its_engines_by_their_global_index(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.engine import coordinator as stock

    monkeypatch.setattr(stock, "set_process_title", lambda *args: None)
    node = coordinator.NodeCoordinator(first=2, engine_count=2, enable_wave_coordination=False)
    assert len(list(node.engines)) == 2, "it waits for as many subscriptions"
    assert len(node.engines) > 3, "vLLM drops the figures of engines beyond"
    node.engines[3].request_counts[1] = 7
    counts = node._get_engine_counts(do_copy=True)
    assert counts[2:] == [[0, 0, 0.0], [0, 7, 0.0]] and len(counts) == 4
    node.ctx.destroy(linger=0)

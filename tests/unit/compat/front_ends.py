"""Configs of front ends, and the engines that they would start; only the processes are missing."""

import dataclasses
import importlib
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dwdp.compat.frontend import coordinator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine that vLLM's process function would have made."""

    config: Any
    engine_index: int

    @property
    def parallel(self) -> Any:
        return self.config.parallel_config


def configure(model: str, place: Path | None, **arguments: Any) -> Any:
    """Return a config of independent ranks that meet at `place`; without one, of stock vLLM."""
    from vllm import EngineArgs

    from vllm_dwdp.compat.frontend.engine_args import install

    install()
    dwdp = {
        "distributed_executor_backend": "dwdp",
        "additional_config": {"dwdp": {"rendezvous": f"unix://{place}"}},
    }
    headless = arguments.pop("headless", False)
    args = EngineArgs(model=model, **arguments, **({} if place is None else dwdp))
    return args.create_engine_config(headless=headless)


def start(
    vllm_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    module: str = "vllm.v1.engine.core_client",
    num_servers: int = 1,
) -> tuple[list[Engine], list[int]]:
    """Return the engines that a front end starts, and the indices of those it waits for."""
    from vllm.v1.engine import utils

    engines: list[Engine] = []
    awaited: list[int] = []

    def make_manager(**kwargs: Any) -> Any:
        for local in range(kwargs["local_engine_count"]):
            engines.append(
                run_engine_core(
                    kwargs["vllm_config"],
                    kwargs["start_index"] + local,
                    kwargs["local_start_index"] + local,
                    monkeypatch,
                )
            )
        return SimpleNamespace()

    def wait(handshake: Any, core_engines: list[Any], *args: Any) -> None:
        awaited.extend(int.from_bytes(engine.identity, "little") for engine in core_engines)

    monkeypatch.setattr(utils, "CoreEngineProcManager", make_manager)
    monkeypatch.setattr(utils, "wait_for_engine_startup", wait)
    balancer = SimpleNamespace(
        proc=SimpleNamespace(pid=0),
        get_engine_socket_addresses=lambda: ("in", "out"),
        get_stats_publish_address=lambda: "stats",
    )
    monkeypatch.setattr(utils, "DPCoordinator", lambda *args, **kwargs: balancer)
    monkeypatch.setattr(coordinator, "start", lambda config: balancer)
    launch = importlib.import_module(module).launch_core_engines
    addresses = utils.EngineZmqAddresses(inputs=["in"] * num_servers, outputs=["out"] * num_servers)
    with launch(vllm_config, object, False, addresses) as launched:
        assert launched.addresses is addresses
        several = num_servers > 1 and vllm_config.parallel_config.data_parallel_size_local > 1
        assert launched.coordinator is (balancer if several else None)
        assert (addresses.coordinator_input == "in") == (launched.coordinator is balancer)
        assert (addresses.frontend_stats_publish_address == "stats") == (
            launched.coordinator is balancer
        )
    return engines, awaited


def run_engine_core(
    vllm_config: Any, rank: int, local: int, monkeypatch: pytest.MonkeyPatch
) -> Engine:
    """Return the engine as vLLM's own process function makes it of what was pickled to it."""
    from vllm.v1.engine import core

    made: list[int] = []

    class Made(Exception):
        pass

    def make(*args: Any, engine_index: int = 0, **kwargs: Any) -> None:
        made.append(engine_index)
        raise Made

    pickled = pickle.loads(pickle.dumps(vllm_config))
    function = core.EngineCoreProc.run_engine_core
    with monkeypatch.context() as patched:
        for name in ("set_process_title", "decorate_logs", "maybe_init_worker_tracer"):
            patched.setattr(core, name, lambda *args: None)
        for name in ("maybe_register_config_serialize_by_value", "configure_logging"):
            patched.setattr(core, name, lambda *args: None)
        handlers = SimpleNamespace(SIGTERM=15, SIGINT=2, SIG_DFL=0, signal=lambda *args: None)
        patched.setattr(core, "signal", handlers)
        patched.setattr(core, "EngineCoreProc", make)
        patched.setattr(core, "DPEngineCoreProc", "ranks are coupled")
        with pytest.raises(Made):
            function(vllm_config=pickled, dp_rank=rank, local_dp_rank=local)
    return Engine(config=pickled, engine_index=made[0])

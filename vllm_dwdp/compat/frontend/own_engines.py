"""A front end that starts all the ranks it serves: any but that of headless nodes, or of Ray.

Stock vLLM couples front ends in external and hybrid load balancing: each engine shakes hands with the
front end of rank 0, and each client listens to its coordinator. Here a front end waits for its own
engines and balances over them; it has a coordinator only where several API servers share them. The
config stays as stock vLLM made it, so that everything derived from a rank's index, port or device is
what it is there (docs/compat.md, "Whose index it is").
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_dwdp.compat.frontend import coordinator, ray_ranks, waiting_engine
from vllm_dwdp.compat.worker import independent
from vllm_dwdp.compat.worker.attributes import replaced

LAUNCHING_MODULES = ("vllm.v1.engine.core_client", "vllm.entrypoints.cli.serve")
"""Those that import `launch_core_engines` by name."""


def install() -> None:
    """From now on, front ends of independent ranks wait for no engine but their own."""
    from vllm.v1.engine import core_client

    for name in LAUNCHING_MODULES:
        module = sys.modules.get(name)
        if module is not None:
            module.launch_core_engines = _launching(_stock(module.launch_core_engines))  # type: ignore[attr-defined]
    make_client = _stock(core_client.EngineCoreClient.make_async_mp_client)
    core_client.EngineCoreClient.make_async_mp_client = staticmethod(_choosing(make_client))


@contextmanager
def while_offline_engines_start() -> Iterator[None]:
    """While active, an offline `LLM` of several ranks starts them without a coordinator."""
    from vllm.v1.engine import core_client

    launching = _launching(_stock(core_client.launch_core_engines))
    with replaced(core_client, launch_core_engines=launching):
        yield


def _stock(function: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(function, "dwdp_stock", function)


def _starts_its_ranks(vllm_config: Any) -> bool:
    if ray_ranks.are_started(vllm_config):
        return False
    parallel = vllm_config.parallel_config
    starts_all = 1 < parallel.data_parallel_size == parallel.data_parallel_size_local
    return independent.is_planted(vllm_config) and (parallel.local_engines_only or starts_all)


def _launching(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def launch_core_engines(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        launch = stock
        if _starts_its_ranks(vllm_config):
            launch = launch_own_engines
        elif ray_ranks.are_started(vllm_config):
            launch = ray_ranks.launching(stock)
        return launch(vllm_config, *args, **kwargs)

    launch_core_engines.dwdp_stock = stock  # type: ignore[attr-defined]
    return launch_core_engines


def _choosing(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def make_async_mp_client(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        make = _client_of_its_ranks(vllm_config, *args, **kwargs) or stock
        return make(vllm_config, *args, **kwargs)

    make_async_mp_client.dwdp_stock = stock  # type: ignore[attr-defined]
    return make_async_mp_client


def _client_of_its_ranks(
    vllm_config: Any,
    executor_class: Any,
    log_stats: bool,
    client_addresses: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return the client class of a front end that starts its ranks; None if it needs a coordinator."""
    from vllm.v1.engine.core_client import AsyncMPClient

    if not _starts_its_ranks(vllm_config):
        return None
    if vllm_config.parallel_config.data_parallel_external_lb:
        return AsyncMPClient
    if client_addresses:  # one of several API servers
        return None
    from vllm_dwdp.compat.frontend.balancing import OnlyClient

    return OnlyClient


def _needs_coordinator(num_ranks: int, num_clients: int) -> bool:
    """Whether a process must tell clients how busy ranks are: they send, unknown to each other."""
    from vllm import envs

    return num_ranks > 1 and (num_clients > 1 or bool(envs.VLLM_USE_RUST_FRONTEND))


@contextmanager
def launch_own_engines(
    vllm_config: Any, executor_class: Any, log_stats: bool, addresses: Any
) -> Iterator[Any]:
    """Start the engines of this front end; when the body is left, wait until they are ready.

    Stands where vLLM's `launch_core_engines` does, and yields its `CoreEngineLaunch`.
    """
    from vllm.utils import network_utils
    from vllm.v1.engine import utils

    parallel = vllm_config.parallel_config
    first, count = parallel.data_parallel_rank, parallel.data_parallel_size_local
    coordinated = _needs_coordinator(count, len(addresses.inputs))
    balancer = coordinator.start(vllm_config) if coordinated else None
    if balancer is not None:
        incoming, outgoing = balancer.get_engine_socket_addresses()
        addresses.coordinator_input, addresses.coordinator_output = incoming, outgoing
        addresses.frontend_stats_publish_address = balancer.get_stats_publish_address()
    tensor_queue = _make_tensor_queue(vllm_config)
    handshake_address = network_utils.get_open_zmq_ipc_path()
    with utils.zmq_socket_ctx(handshake_address, utils.zmq.ROUTER, bind=True) as handshake_socket:
        with waiting_engine.in_place(utils):
            manager = utils.CoreEngineProcManager(
                local_engine_count=count,
                start_index=first,
                local_start_index=0,
                vllm_config=config_of_engines(vllm_config),
                local_client=True,
                handshake_address=handshake_address,
                executor_class=executor_class,
                log_stats=log_stats,
                tensor_queue=tensor_queue,
            )
        launch = utils.CoreEngineLaunch(manager, balancer, addresses, tensor_queue)
        yield launch
        engines = [utils.CoreEngine(index=first + local, local=True) for local in range(count)]
        utils.wait_for_engine_startup(
            handshake_socket, engines, parallel, False, vllm_config.cache_config, launch
        )


def config_of_engines(vllm_config: Any) -> Any:
    """Return the engines' config; behind other front ends, with a `parallel_config` of their own.

    An engine is one rank to itself, of which vLLM refuses to say `data_parallel_external_lb` where a
    config is made anew. `data_parallel_hybrid_lb` means the same to the code that asks there.
    """
    if not vllm_config.parallel_config.local_engines_only:
        return vllm_config
    engines = copy.copy(vllm_config)
    engines.parallel_config = parallel = copy.copy(vllm_config.parallel_config)
    parallel.data_parallel_external_lb, parallel.data_parallel_hybrid_lb = False, True
    return engines


def _make_tensor_queue(vllm_config: Any) -> Any:
    """Return what carries multimodal tensors to the engines past the sockets, if that was asked for."""
    from vllm.utils.system_utils import get_mp_context

    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is None or multimodal.mm_tensor_ipc != "torch_shm":
        return None
    return get_mp_context().Queue()

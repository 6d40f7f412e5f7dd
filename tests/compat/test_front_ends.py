"""Front ends: servers and offline calls, and the engines that they start and wait for."""

import ast
import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.compat.syntax import assignments, calls, entries, tree
from vllm_dwdp.entrypoints.launch.routed import MIDDLEWARE, Routed

pytestmark = pytest.mark.compat


def test_an_engine_takes_stat_loggers_when_it_is_made() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert list(inspect.signature(AsyncLLM.__init__).parameters)[:2] == ["self", "vllm_config"]
    assert "stat_loggers" in inspect.signature(AsyncLLM.__init__).parameters
    assert "list(stat_loggers or [])" in dict(assignments(AsyncLLM.__init__)).values()


def test_an_offline_call_adds_requests_and_runs_the_engine_through_these_methods() -> None:
    """The last part fails when the overrides can go: vLLM aborts nothing on an interrupt."""
    from vllm import LLM
    from vllm.v1.engine.output_processor import OutputProcessor

    assert calls(LLM._run_completion)[-1] == "self._run_engine"
    assert "self._render_and_add_requests" in calls(LLM._add_completion_requests)
    made = dict(assignments(OutputProcessor.__init__))
    assert made["self.request_states"] == made["self.parent_requests"] == "{}"
    assert not any("abort" in name for name in calls(LLM._run_engine))


def test_engines_are_started_before_they_are_waited_for() -> None:
    """On entering, so that interrupts are kept from them; the wait on leaving can be interrupted."""
    from vllm.v1.engine import core_client, utils

    assert "launch_core_engines" in calls(core_client.MPClient.__init__)
    called = calls(utils.launch_core_engines)
    assert called.index("CoreEngineProcManager") < called.index("wait_for_engine_startup")
    made = dict(assignments(utils.CoreEngineProcManager.__init__))
    assert {"self.processes", "self.manager_stopped", "self.failed_proc_name"} <= made.keys()


def test_offline_statistics_are_counted_for_one_engine() -> None:
    """Fails when ours can go: vLLM counts each rank for itself."""
    from vllm.v1.engine import llm_engine

    assert "StatLoggerManager" in calls(llm_engine.LLMEngine.__init__)
    assert "engine_idx" not in ast.unparse(tree(llm_engine.LLMEngine))


def test_start_up_wait_is_looked_up_by_name_and_interrupts_are_swallowed() -> None:
    """The second half fails when the shim can go."""
    import zmq
    from vllm.utils.network_utils import zmq_socket_ctx
    from vllm.v1.engine import utils

    assert callable(utils.wait_for_engine_startup)
    assert "wait_for_engine_startup" in calls(utils.launch_core_engines)
    with zmq_socket_ctx("inproc://contract", zmq.PULL, bind=True) as opened:
        raise KeyboardInterrupt
    assert opened.closed


def test_an_engine_process_only_records_signals_until_it_is_built() -> None:
    """Fails when vLLM's engine ends by itself: then our handlers can go."""
    from vllm.v1.engine.core import EngineCoreProc

    nodes = list(ast.walk(tree(EngineCoreProc.run_engine_core)))
    (handler,) = [
        node
        for node in nodes
        if isinstance(node, ast.FunctionDef) and node.name == "signal_handler"
    ]
    assert not any(isinstance(node, ast.Raise) for node in ast.walk(handler))
    made = [ast.unparse(node) for node in nodes if isinstance(node, ast.Call)]
    assert "signal.signal(signal.SIGTERM, signal_handler)" in made
    assert "signal.signal(signal.SIGINT, signal_handler)" in made


def test_engines_are_launched_by_name_from_two_modules() -> None:
    """What `compat.frontend.own_engines` replaces is all there is."""
    import vllm

    from vllm_dwdp.compat.frontend.own_engines import LAUNCHING_MODULES

    root = Path(vllm.__file__).parent
    importing = set()
    for path in root.rglob("*.py"):
        if "launch_core_engines" in (text := path.read_text()):
            names = [
                node.names for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)
            ]
            if any(alias.name == "launch_core_engines" for each in names for alias in each):
                importing.add(".".join(("vllm", *path.relative_to(root).with_suffix("").parts)))
    assert importing == set(LAUNCHING_MODULES)


def test_what_starts_the_engines_of_one_front_end() -> None:
    from vllm.v1.engine import core_client, utils

    parameters = list(inspect.signature(utils.launch_core_engines).parameters)
    assert parameters == ["vllm_config", "executor_class", "log_stats", "addresses"]
    fields = [field.name for field in dataclasses.fields(utils.CoreEngineLaunch)]
    assert fields[:4] == ["engine_manager", "coordinator", "addresses", "tensor_queue"]
    assert {
        "coordinator_input",
        "coordinator_output",
        "frontend_stats_publish_address",
    } <= {field.name for field in dataclasses.fields(utils.EngineZmqAddresses)}
    assert list(inspect.signature(utils.wait_for_engine_startup).parameters) == [
        "handshake_socket",
        "core_engines",
        "parallel_config",
        "coordinated_dp",
        "cache_config",
        "launch",
    ]
    made = set(inspect.signature(utils.CoreEngineProcManager.__init__).parameters)
    assert made == {
        "self",
        "local_engine_count",
        "start_index",
        "local_start_index",
        "vllm_config",
        "local_client",
        "handshake_address",
        "executor_class",
        "log_stats",
        "client_handshake_address",
        "tensor_queue",
    }
    clients = [
        core_client.AsyncMPClient.__init__,
        core_client.EngineCoreClient.make_async_mp_client,
    ]
    taken = [
        [name for name in inspect.signature(each).parameters if name != "self"] for each in clients
    ]
    assert taken[0] == taken[1]


def test_plugins_are_loaded_before_the_command_to_run_is_looked_up() -> None:
    """What `compat.frontend.serve_defaults` wraps; the last part fails when it can go."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli import main, serve

    assert "load_general_plugins" in calls(AsyncEngineArgs.add_cli_args)
    assert "cmd.subparser_init(subparsers).set_defaults" in calls(main.main)
    (default,) = [
        node.value
        for node in ast.walk(tree(main.main))
        if isinstance(node, ast.keyword) and node.arg == "dispatch_function"
    ]
    assert ast.unparse(default) == "cmd.cmd"
    chosen = dict(assignments(serve.ServeSubcommand.cmd))
    assert chosen["args.api_server_count"] is not None
    assert "args.api_server_count = args.data_parallel_size" in ast.unparse(
        tree(serve.ServeSubcommand.cmd)
    )


def test_what_the_only_client_of_several_ranks_rests_on() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import core_client

    client = core_client.DPLBAsyncMPClient
    made = dict(assignments(client.__init__)) | dict(
        assignments(core_client.DPAsyncMPClient.__init__)
    )
    assert {"self.engine_inflight", "self.lb_engines"} <= set(made)
    assert inspect.iscoroutinefunction(client.process_engine_outputs)
    chooses = ast.unparse(tree(client.get_core_engine_for_request))
    assert "waiting, running, kv_cache_usage = current_counts[idx]" in chooses
    assert "max(self.client_count * inflight, waiting + running)" in chooses
    asserted = [
        ast.unparse(node.test)
        for node in ast.walk(tree(core_client.DPAsyncMPClient._ensure_stats_update_task))
        if isinstance(node, ast.Assert)
    ]
    assert "self.stats_update_address is not None" in asserted, "a client without coordinator"
    assert "eco.scheduler_stats = stats" in ast.unparse(tree(Scheduler.update_from_output))


def test_the_coordinator_is_looked_up_by_name_and_counts_its_engines() -> None:
    from vllm.v1.engine import coordinator

    runs = dict(entries(coordinator.DPCoordinator.__init__))
    assert runs["engine_count"] == "parallel_config.data_parallel_size"
    keywords = [
        node
        for node in ast.walk(tree(coordinator.DPCoordinator.__init__))
        if isinstance(node, ast.keyword)
    ]
    targets = [ast.unparse(node.value) for node in keywords if node.arg == "target"]
    assert targets == ["DPCoordinatorProc.run_coordinator"]
    assert "DPCoordinatorProc" in calls(coordinator.DPCoordinatorProc.run_coordinator)
    uses = {
        ast.unparse(node)
        for node in ast.walk(tree(coordinator.DPCoordinatorProc.process_input_socket))
        if isinstance(node, ast.Call | ast.Subscript)
    }
    assert {"len(self.engines)", "self.engines[eng_index]"} <= uses


def test_offline_client_members() -> None:
    from vllm.v1.engine import core_client

    made = dict(assignments(core_client.MPClient.__init__))
    made |= dict(assignments(core_client.SyncMPClient.__init__))
    for name in ("core_engines", "utility_results", "outputs_queue", "input_socket", "encoder"):
        assert f"self.{name}" in made, name
    assert made["self.resources"].startswith("BackgroundResources(")
    waves = "self.vllm_config.parallel_config.data_parallel_size > 1"
    assert made["self.is_dp"] == waves, "a client of one rank waits for no wave"
    resources = {field.name for field in dataclasses.fields(core_client.BackgroundResources)}
    assert {"engine_manager", "engine_dead"} <= resources
    assert "self.engine_ranks_managed" in made
    assert callable(core_client.SyncMPClient._format_exception)
    parameters = list(inspect.signature(core_client.EngineCoreClient.make_client).parameters)
    assert parameters[:5] == [
        "multiprocess_mode",
        "asyncio_mode",
        "vllm_config",
        "executor_class",
        "log_stats",
    ]


def test_the_middleware_that_is_given_last_is_asked_first() -> None:
    """And before vLLM's own, such as the one that asks for the API key."""
    from fastapi import FastAPI
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

    app = FastAPI()
    args = SimpleNamespace(
        allowed_origins=["*"],
        allow_credentials=False,
        allowed_methods=["*"],
        allowed_headers=["*"],
        api_key=["key"],
        enable_request_id_headers=False,
        middleware=[f"{__name__}.UsersOwn", MIDDLEWARE],
    )
    init_entrypoints_middleware(args, app, ("generate",))
    assert [each.cls for each in app.user_middleware][:2] == [Routed, UsersOwn]


def test_another_server_is_chosen_by_this_variable() -> None:
    from vllm import envs

    from vllm_dwdp.entrypoints.launch.environment import RUST_FRONT_END

    assert RUST_FRONT_END in envs.environment_variables


class UsersOwn:
    """A middleware."""


def test_an_engine_process_is_made_by_a_context_that_can_be_another() -> None:
    """As `waiting_engine` puts one in place: asked for once, for one process per engine."""
    from vllm.v1.engine import utils

    made = calls(utils.CoreEngineProcManager.__init__)
    assert made.count("get_mp_context") == 1 and made.count("context.Process") == 1
    assert callable(utils.get_mp_context)

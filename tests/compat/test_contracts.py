"""One contract per private vLLM name that `vllm_dwdp.compat` touches; see docs/compat.md.

An upgrade of vLLM that moves one of them fails here, by name, and not in a serving rank.
"""

import ast
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.compat.syntax import assignments, calls, entries, tree
from tests.compat.versions import vllm_minor
from vllm_dwdp.entrypoints.doctor.software import TESTED_VLLM
from vllm_dwdp.entrypoints.launch.routed import MIDDLEWARE, Routed

pytestmark = pytest.mark.compat

ROOT = Path(__file__).parents[2]


def test_vllm_is_in_the_tested_range() -> None:
    first, end = TESTED_VLLM
    assert first <= vllm_minor() < end


def test_the_range_of_the_requirements_is_the_one_of_doctor() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert "vllm>={}.{},<{}.{}".format(*TESTED_VLLM[0], *TESTED_VLLM[1]) in extras["cuda"]


def test_engine_args_has_every_field_that_is_refused_with_the_neutral_value_as_default() -> None:
    from vllm import EngineArgs

    from vllm_dwdp.compat.frontend.engine_fields import SINCE
    from vllm_dwdp.compat.frontend.refusals import REFUSED

    defaults = {field.name: field.default for field in dataclasses.fields(EngineArgs)}
    later = {name for name, first in SINCE.items() if vllm_minor() < first}
    for field, flag, neutral, _ in REFUSED:
        if field in later:
            continue
        assert field in defaults, f"{flag} has gone"
        default = defaults[field]
        if default is not dataclasses.MISSING:
            assert default in (neutral, None), f"{flag} is {default!r} when it is not given"


def test_every_field_of_engine_args_is_in_one_class() -> None:
    """A new flag of vLLM must be looked at; one that has gone must be forgotten."""
    from vllm import EngineArgs

    from vllm_dwdp.compat.frontend.engine_fields import FIELDS, SINCE

    assert list(FIELDS) == ["supported", "refused", "irrelevant", "untested"]
    classified = Counter(name for names in FIELDS.values() for name in names)
    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert not fields - set(classified), "in no class of compat/frontend/engine_fields.py"
    expected = {name for name in classified if vllm_minor() >= SINCE.get(name, (0, 0))}
    assert not expected - fields, "no longer fields of EngineArgs"
    assert not fields & (set(classified) - expected), "older than `SINCE` says"
    assert not [name for name, count in classified.items() if count > 1], "in two classes"


def test_engine_args_tells_spawned_api_servers_apart() -> None:
    from vllm import EngineArgs

    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert {"_api_process_count", "_api_process_rank", "worker_cls"} <= fields


@pytest.mark.parametrize("is_moe", [False, True])
def test_independence_is_keyed_on_is_moe(is_moe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own process function makes one kind of engine or the other, and uncouples the rank."""
    from vllm.config import ModelConfig
    from vllm.v1.engine import core

    assert isinstance(inspect.getattr_static(ModelConfig, "is_moe"), property)
    run_engine_core = core.EngineCoreProc.run_engine_core
    done: list[str] = []

    class Made(Exception):
        pass

    def engine(kind: str) -> Any:
        def make(*args: Any, **kwargs: Any) -> None:
            done.append(kind)
            raise Made

        return make

    for name in ("set_process_title", "decorate_logs", "maybe_init_worker_tracer"):
        monkeypatch.setattr(core, name, lambda *args: None)
    monkeypatch.setattr(core, "maybe_register_config_serialize_by_value", lambda: None)
    handlers = SimpleNamespace(SIGTERM=15, SIGINT=2, SIG_DFL=0, signal=lambda *args: None)
    monkeypatch.setattr(core, "signal", handlers)
    monkeypatch.setattr(core, "DPEngineCoreProc", engine("lockstep"))
    monkeypatch.setattr(core, "EngineCoreProc", engine("independent"))
    parallel_config = SimpleNamespace(
        data_parallel_size=2,
        numa_bind=False,
        reconfigure_for_independent_dp_rank=lambda: done.append("uncoupled"),
    )
    vllm_config = SimpleNamespace(
        parallel_config=parallel_config,
        model_config=SimpleNamespace(is_moe=is_moe),
        kv_transfer_config=None,
    )
    with pytest.raises(Made):
        run_engine_core(vllm_config=vllm_config, dp_rank=1, local_dp_rank=1)
    assert done == (["lockstep"] if is_moe else ["uncoupled", "independent"])


@pytest.mark.parametrize(("total", "own_front_end"), [(1, False), (2, True), (2, False)])
def test_a_front_end_and_its_engines_agree_where_processed_images_are_kept(
    total: int, own_front_end: bool
) -> None:
    """`match_front_end_cache`; without it an engine waits for shared memory that nobody has made."""
    from vllm.multimodal.cache import factories

    from vllm_dwdp.compat.worker import independent
    from vllm_dwdp.config import DwdpConfig
    from vllm_dwdp.distributed.launch import DwdpLaunch, RankSpan

    def cache_type(data_parallel_size: int) -> Any:
        parallel_config.data_parallel_size = data_parallel_size
        return factories._get_cache_type(vllm_config)

    multimodal = SimpleNamespace(mm_processor_cache_gb=4, mm_processor_cache_type="shm")
    model_config = SimpleNamespace(
        supports_multimodal_inputs=True,
        multimodal_config=multimodal,
        get_multimodal_config=lambda: multimodal,
    )
    parallel_config = SimpleNamespace(
        _api_process_count=1, data_parallel_external_lb=own_front_end, data_parallel_index=0
    )
    vllm_config: Any = SimpleNamespace(model_config=model_config, parallel_config=parallel_config)
    launch = DwdpLaunch(
        config=DwdpConfig(group_size=2),
        ranks=RankSpan(first=0, count=1 if own_front_end else total, total=total),
        endpoint=None,  # type: ignore[arg-type]
    )
    model_config.dwdp_launch = launch
    of_the_front_end = cache_type(total)
    assert of_the_front_end == ("processor_only" if total == 2 and not own_front_end else "shm")
    assert cache_type(1) == "shm", "an independent engine knows of one rank"
    independent.match_front_end_cache(vllm_config)
    keeps_there = of_the_front_end == "shm"
    assert cache_type(1) == ("shm" if keeps_there else None)


def test_the_independent_config_pickles_by_reference() -> None:
    import pickletools

    from vllm_dwdp.compat.worker.independent import IndependentModelConfig

    strings = [
        argument
        for _, argument, _ in pickletools.genops(__import__("pickle").dumps(IndependentModelConfig))
        if isinstance(argument, str)
    ]
    assert strings == ["vllm_dwdp.compat.worker.independent", "IndependentModelConfig"]


def test_routed_experts_takes_what_the_replacement_passes() -> None:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    names = list(inspect.signature(RoutedExperts.__init__).parameters)
    assert names[1:6] == [
        "layer_name",
        "params_dtype",
        "moe_config",
        "quant_config",
        "expert_map_manager",
    ]
    for name in ("_ensure_moe_quant_config_init", "forward_modular", "forward_monolithic"):
        assert callable(getattr(RoutedExperts, name))


def test_layer_registry() -> None:
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot

    class StockLayer(PluggableLayer):
        pass

    class OurLayer(StockLayer):
        pass

    assert isinstance(op_registry_oot, dict)
    assert type(StockLayer()) is StockLayer
    op_registry_oot["StockLayer"] = OurLayer
    try:
        assert type(StockLayer()) is OurLayer
    finally:
        del op_registry_oot["StockLayer"]


def test_checkpoint_reader_hooks(tmp_path: Path) -> None:
    """What the default reader opens files with, and what it makes of them."""
    import torch
    from safetensors.torch import save_file
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from vllm_dwdp.compat.worker.checkpoint_reader import mapped_experts, split_experts

    fused = torch.arange(6.0).view(3, 2)
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": fused, "dense": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    model: Any = SimpleNamespace()
    config: Any = SimpleNamespace(model=str(tmp_path), revision=None)
    loader = DefaultModelLoader(LoadConfig(use_tqdm_on_load=False))
    with mapped_experts():
        read = dict(loader.get_all_weights(config, model))
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    num_bytes = (tmp_path / "model.safetensors").stat().st_size
    mapped = read["model.layers.0.mlp.experts.gate_up_proj"]
    assert mapped.untyped_storage().nbytes() == num_bytes, "the whole file is behind it"
    with split_experts(lambda: True):
        split = dict(loader.get_all_weights(config, model))
    assert sorted(split) == [
        "dense",
        *(f"model.layers.0.mlp.experts.{expert}.gate_up_proj" for expert in range(3)),
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_dummy_weights_of_a_rank_are_its_rows_of_what_stock_vllm_makes(rank: int) -> None:
    import torch
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    from tests.unit.model_executor.stand_in import NUM_EXPERTS, Loaded, Stock

    loader, anything = DummyModelLoader(LoadConfig(load_format="dummy")), cast(Any, None)
    config = SimpleNamespace(num_experts=NUM_EXPERTS)
    bias = torch.nn.Parameter(torch.ones(NUM_EXPERTS), requires_grad=False)
    stock = Stock("experts", torch.bfloat16, config, None, None, bias)
    loader.load_weights(stock, anything)
    loaded = Loaded(rank)
    with loaded.shard.loading():
        loader.load_weights(loaded.layer, anything)
    resident = loaded.layer.raw.resident
    rows = stock.w13_weight[resident.start : resident.stop]
    assert len(rows) and torch.equal(loaded.layer.w13_weight.data, rows)
    assert torch.equal(loaded.layer.w13_scale.data, stock.w13_scale.data)
    loaded.close()


def test_what_quantises_while_it_loads_is_known_by_its_base() -> None:
    import pkgutil
    from importlib import import_module

    from vllm.model_executor.layers.quantization import online
    from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase

    for module in pkgutil.iter_modules(online.__path__, online.__name__ + "."):
        for name, found in vars(import_module(module.name)).items():
            ours = getattr(found, "__module__", "").startswith(online.__name__)
            if name.endswith("MoEMethod") and ours:
                assert issubclass(found, OnlineMoEMethodBase), name


def test_gpt_oss_by_quark_is_refused_for_its_loader() -> None:
    """It writes experts by their global number, past `weight_loader`."""
    from vllm.model_executor.layers.quantization.quark import quark_moe
    from vllm.model_executor.models.gpt_oss import GptOssModel, GptOssRoutedExperts

    from vllm_dwdp.compat.worker.moe import check_method
    from vllm_dwdp.errors import DwdpUnsupportedError

    assert "copy_" in "".join(calls(GptOssModel._load_weights_quark)), "it can be shared now"
    methods = [each for name, each in vars(quark_moe).items() if name.startswith("Quark")]
    assert methods
    layer: Any = GptOssRoutedExperts.__new__(GptOssRoutedExperts)
    layer.__dict__ |= {"layer_name": "experts", "quant_method": object.__new__(methods[-1])}
    with pytest.raises(DwdpUnsupportedError, match=r"Quark\w+ is loaded past .* MXFP4 checkpoint"):
        check_method(layer)


def test_layers_are_processed_through_their_method_one_by_one() -> None:
    """So that a layer is whole for as long as it is processed, and no longer."""
    from vllm.model_executor.model_loader import utils
    from vllm.model_executor.models.gpt_oss import GptOssModel

    assert "quant_method.process_weights_after_loading" in calls(
        utils.process_weights_after_loading
    )
    assert "param.copy_" in calls(GptOssModel._load_weights_other), "the split can go"


def test_wrappable_classes_exist() -> None:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_dwdp.compat.worker.moe import wrappable_classes

    assert all(issubclass(cls, RoutedExperts) for cls in wrappable_classes())


@pytest.mark.parametrize(("num_workers", "counted"), [(1, 2**20), (2, 2**20 + 2**22 // 2)])
def test_cpu_worker_sizes_by_resident_memory(
    monkeypatch: pytest.MonkeyPatch, num_workers: int, counted: int
) -> None:
    """Two workers of a rank divide their engine's."""
    from vllm.v1.worker import cpu_worker

    from vllm_dwdp.compat.worker import cpu

    worker: Any = SimpleNamespace(
        _should_warm_up_model=lambda: False,
        cache_config=SimpleNamespace(kv_cache_memory_bytes=None),
        requested_cpu_memory=2**30,
    )
    nodes = SimpleNamespace(available_memory=2**40, total_memory=2**40)
    monkeypatch.setattr(cpu_worker, "get_memory_node_info", lambda node: nodes)
    sizes = {os.getpid(): 2**20, os.getppid(): 2**22}
    monkeypatch.setattr(cpu, "proportional_set_bytes", sizes.__getitem__)
    with cpu.proportional_memory(num_workers):
        assert cpu_worker.CPUWorker.determine_available_memory(worker) == 2**30 - counted


def test_segments_of_messages_are_mapped_by_all_workers_once_they_have_met() -> None:
    """And by nobody afterwards, so that their names may go."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.v1.worker.cpu_worker import CPUWorker

    assert "-cpushm" in inspect.getsource(_CPUSHMDistributed.make_group_name)
    source = inspect.getsource(_CPUSHMDistributed._init_cpu_shm)
    order = [source.index(step) for step in ("init_shm_manager", "join_shm_manager", "return")]
    assert order == sorted(order)
    assert "barrier" in source[order[1] : order[2]]
    assert "self._init_cpu_shm()" in inspect.getsource(_CPUSHMDistributed.__init__)
    assert "init_worker_distributed_environment(" in inspect.getsource(CPUWorker.init_device)


def test_cpu_binding_variable_and_its_parser() -> None:
    from vllm import envs
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    from vllm_dwdp.compat.worker.cpu import BIND_ENV

    assert BIND_ENV in envs.environment_variables
    assert envs.environment_variables[BIND_ENV]() == "auto"
    made = dict(assignments(OMPProcessManager._parse_omp_threads_bind_env))
    for name in ("skip_setup", "cpu_lists"):
        assert f"self.{name}" in made, name


def test_each_worker_process_starts_inside_of_the_setting_of_its_cores() -> None:
    from vllm.utils.ompmultiprocessing import OMPProcessManager
    from vllm.v1.executor import multiproc_executor

    assert multiproc_executor.OMPProcessManager is OMPProcessManager, "looked up by name"
    assert list(inspect.signature(OMPProcessManager.configure_omp_envs).parameters) == [
        "self",
        "rank",
        "local_rank",
    ]
    source = inspect.getsource(multiproc_executor.MultiprocExecutor._init_executor)
    start = source.index(".configure_omp_envs(")
    assert start < source.index("WorkerProc.make_worker_process(", start)


def test_a_layers_config_says_into_how_many_slices_it_is_cut() -> None:
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
    )

    assert "moe_parallel_config" in FusedMoEConfig.__dataclass_fields__
    assert "tp_size" in FusedMoEParallelConfig.__dataclass_fields__


def test_ray_reserves_the_resource_that_the_platform_names() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.engine import utils

    assert current_platform.ray_device_key == "", "the CPU build has none: ours can go"
    for method in ("create_dp_placement_groups", "add_dp_placement_groups"):
        source = inspect.getsource(getattr(utils.CoreEngineActorManager, method))
        assert "device_str = current_platform.ray_device_key" in source
    launching = inspect.getsource(utils.launch_core_engines)
    assert 'parallel_config.data_parallel_backend == "ray"' in launching
    assert "vllm_config.model_config.is_moe" in inspect.getsource(
        utils.CoreEngineActorManager.__init__
    ), "chooses the actor of independent ranks"


def test_cpu_worker_takes_memory_of_the_node_of_the_first_core_that_it_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from vllm.utils import cpu_resource_utils
    from vllm.v1.worker import cpu_worker

    class NodeChosenError(Exception):
        pass

    def choose(nodes: list[int]) -> None:
        raise NodeChosenError(nodes)

    def start_on(core: int) -> None:
        os.sched_setaffinity(0, {core})  # of this thread
        parallel_config = SimpleNamespace(assigned_physical_gpu_ids=None)
        cpu_worker.CPUWorker(SimpleNamespace(parallel_config=parallel_config), 0, 0, "")

    allowed = sorted(os.sched_getaffinity(0))
    cores = [cpu_resource_utils.LogicalCPUInfo(core, core, 10 + core) for core in allowed]
    monkeypatch.setattr(cpu_resource_utils, "_get_cpu_list", lambda: cores)
    monkeypatch.setattr(
        cpu_worker, "get_visible_memory_node", lambda *_: [10 + core for core in allowed]
    )
    monkeypatch.setattr(torch.ops._C, "init_cpu_memory_env", choose)
    with ThreadPoolExecutor(1) as pool:
        for core in allowed:
            with pytest.raises(NodeChosenError, match=rf"\[{10 + core}\]"):
                pool.submit(start_on, core).result()


def test_devices_of_a_rank_are_memory_nodes_since_033_and_we_hide_them() -> None:
    """Fails when hiding them can go: rank 1 has no node on a machine of one."""
    from vllm.utils import cpu_resource_utils
    from vllm.utils.ompmultiprocessing import OMPProcessManager
    from vllm.v1.engine import utils

    from vllm_dwdp.compat.worker.cpu import bound_cores

    assert "assigned_physical_gpu_ids" in ast.unparse(tree(utils.CoreEngineProcManager.__init__))
    takes = list(inspect.signature(cpu_resource_utils.get_visible_memory_node).parameters)
    assert takes == (["assigned_node_ids"] if vllm_minor() >= (0, 33) else [])
    absent = max(cpu.numa_node for cpu in cpu_resource_utils.get_allowed_cpu_list()) + 1
    parallel_config = SimpleNamespace(
        assigned_physical_gpu_ids=[absent],
        data_parallel_rank_local=1,
        local_world_size=1,
        _api_process_count=1,
    )
    config: Any = SimpleNamespace(parallel_config=parallel_config, kv_transfer_config=None)
    with bound_cores(parallel_config, [1], 2):
        if takes:
            assert cpu_resource_utils.get_visible_memory_node([absent]) == []
            assert OMPProcessManager(config).assigned_node_ids is None
        assert OMPProcessManager(config).cpu_lists
    assert parallel_config.assigned_physical_gpu_ids == [absent]


def test_a_rank_of_one_process_takes_the_gpu_of_its_place_among_the_ranks_of_its_host() -> None:
    """Since 0.33 by a function of its own, before inside of `Worker.init_device`."""
    from vllm.config import ParallelConfig
    from vllm.v1.worker.gpu_worker import Worker

    if vllm_minor() < (0, 33):
        assert "data_parallel_rank_local" in ast.unparse(tree(Worker.init_device))
        return
    assert "parallel_config.get_local_gpu_index" in calls(Worker.init_device)
    facts: dict[str, Any] = {
        "distributed_executor_backend": "vllm_dwdp.executor.executor.DwdpExecutor",
        "data_parallel_backend": "mp",
        "nnodes_within_dp": 1,
        "world_size": 1,
        "data_parallel_index": 3,
    }
    for place, expected in ((0, 0), (1, 1), (None, 3)):
        rank: Any = SimpleNamespace(**facts, data_parallel_rank_local=place)
        assert ParallelConfig.get_local_gpu_index(rank, 0) == expected


def test_parameters_are_replaced_only_while_a_layer_is_processed() -> None:
    """Since 0.33 in place where they fit: done later, it would write into what peers read."""
    import torch
    import vllm
    from vllm.model_executor.utils import replace_parameter

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    before = layer.weight.data_ptr()
    replace_parameter(layer, "weight", torch.ones(2))
    assert layer.weight.tolist() == [1, 1]
    assert (layer.weight.data_ptr() == before) == (vllm_minor() >= (0, 33))
    layers = Path(vllm.__file__).parent / "model_executor" / "layers"
    callers = {
        node.name
        for folder in ("fused_moe", "quantization")
        for path in (layers / folder).rglob("*.py")
        if "replace_parameter" in (text := path.read_text())
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and "replace_parameter" in calls_in(node)
    }
    assert "process_weights_after_loading" in callers
    per_step = r"__call__|(forward|apply)\w*|prepare|finalize|run|select_experts"
    assert not [name for name in callers if re.fullmatch(per_step, name)], callers


def calls_in(node: ast.FunctionDef) -> set[str]:
    return {ast.unparse(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)}


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


def test_worker_queues_take_as_much_shared_memory_as_doctor_asks_for() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, ShmRingBuffer

    from vllm_dwdp.entrypoints.doctor.queues import WORKER_QUEUE_BYTES

    sizes = inspect.signature(MessageQueue.__init__).parameters
    buffer = ShmRingBuffer(1, 1, 1)
    each = sizes["max_chunk_bytes"].default + buffer.metadata_size
    needed = each * sizes["max_chunks"].default
    assert 0 <= WORKER_QUEUE_BYTES - needed < 2**20


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


def test_executor_and_worker_hooks() -> None:
    from vllm.v1.executor import Executor
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor
    from vllm.v1.worker.cpu_worker import CPUWorker

    for executor in (MultiprocExecutor, UniProcExecutor):
        assert callable(executor._init_executor)
        assert issubclass(executor, Executor)
        assert "self._init_executor" in calls(Executor.__init__)
    assert UniProcExecutor.supports_async_scheduling()
    started = calls(UniProcExecutor._init_executor)
    for name in ("init_worker", "init_device", "load_model"):
        assert f"self.driver_worker.{name}" in started, name
    assert "self.collective_rpc" in calls(UniProcExecutor.execute_model), "in the calling thread"
    for name in ("load_model", "execute_model", "determine_available_memory", "shutdown"):
        assert callable(getattr(CPUWorker, name))


def test_graphs_are_captured_and_replayed_through_torchs_class() -> None:
    """All of vLLM's Python: what `compat.worker.cuda_graphs` wraps is all there is; a miss is named."""
    import vllm

    root = Path(vllm.__file__).parent
    sources = {path: path.read_text() for path in sorted(root.rglob("*.py"))}
    found = {
        path.relative_to(root).as_posix(): graph_uses(text)
        for path, text in sources.items()
        if re.search(r"CUDAGraph|(cu|cuda|hip)Graph|graphed", text)
    }
    made = [place for place, uses in found.items() if "torch.cuda.CUDAGraph()" in uses]
    assert {"compilation/cuda_graph.py", "v1/worker/gpu/cudagraph_utils.py"} <= set(made), made
    allowed = {"torch.cuda.CUDAGraph()"}
    others = {place: uses - allowed for place, uses in found.items() if uses - allowed}
    # On XPUs vLLM replaces torch's class; there is no DWDP there.
    assert others == {"v1/worker/xpu_model_runner.py": {"torch.cuda.CUDAGraph = ..."}}, others


@pytest.mark.parametrize(
    ("text", "uses"),
    [
        ("g = torch.cuda.CUDAGraph()", {"torch.cuda.CUDAGraph()"}),
        ("g = CUDAGraph()", {"CUDAGraph()"}),
        ("g = torch._C._CUDAGraph(keep_graph=True)", {"torch._C._CUDAGraph"}),
        ("from torch._C import _CUDAGraph as G", {"_CUDAGraph"}),
        ("from torch.cuda.graphs import CUDAGraph", {"CUDAGraph"}),
        ("class G(torch.cuda.CUDAGraph): ...", {"class G(torch.cuda.CUDAGraph)"}),
        ("make = torch.cuda.CUDAGraph", {"torch.cuda.CUDAGraph"}),
        ("torch.cuda.CUDAGraph.replay(g)", {"torch.cuda.CUDAGraph.replay"}),
        ("lib.cudaGraphLaunch(g, s)", {"lib.cudaGraphLaunch"}),
        ("getattr(lib, 'cuGraphLaunch')(g, s)", {"'cuGraphLaunch'"}),
        ("f = torch.cuda.make_graphed_callables(f, x)", {"torch.cuda.make_graphed_callables"}),
        ("graph: torch.cuda.CUDAGraph | None = None", set()),
        (
            "def f(g: dict[int, torch.cuda.CUDAGraph]) -> None: 'a CUDAGraph is cuGraphLaunched'",
            set(),
        ),
    ],
)
def test_a_way_around_torchs_graphs_is_seen(text: str, uses: set[str]) -> None:
    assert graph_uses(text) == uses


def graph_uses(text: str) -> set[str]:
    """Every way in which a source touches graph classes or the driver's graph calls, but types."""
    visitor = GraphUses()
    visitor.visit(ast.parse(text))
    return visitor.uses


class GraphUses(ast.NodeVisitor):
    """Collects them; annotations are skipped."""

    def __init__(self) -> None:
        self.uses: set[str] = set()

    def generic_visit(self, node: ast.AST) -> None:
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns"):
                for each in value if isinstance(value, list) else [value]:
                    if isinstance(each, ast.AST):
                        self.visit(each)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        graphs = [ast.unparse(base) for base in node.bases if is_graph(ast.unparse(base))]
        self.uses |= {f"class {node.name}({base})" for base in graphs}
        node.bases = [base for base in node.bases if not is_graph(ast.unparse(base))]
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        targets = [ast.unparse(target) for target in node.targets]
        self.uses |= {f"{target} = ..." for target in targets if is_graph(target)}
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        if re.fullmatch(r"(torch\.cuda\.)?CUDAGraph", name):
            self.uses.add(f"{name}()")
            node.func = ast.Name("made")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if is_graph(ast.unparse(node)):
            self.uses.add(ast.unparse(node))
        else:
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.uses |= {node.id} if is_graph(node.id) else set()

    def visit_alias(self, node: ast.alias) -> None:
        self.uses |= {node.name} if is_graph(node.name) else set()

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and is_graph(node.value):
            self.uses.add(repr(node.value))


def is_graph(name: str) -> bool:
    """Whether a dotted name is torch's graph class, a member of it, or a call that makes graphs."""
    members = r"_?CUDAGraph(\.\w+)?|(cu|cuda|hip)Graph[A-Z]\w*|make_graphed_callables"
    return bool(re.fullmatch(rf"([\w.]+\.)?({members})", name))


def test_on_gpus_the_layer_is_called_inside_an_opaque_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There wait and record run eagerly, also during capture, and are never traced."""
    import torch
    from vllm.model_executor.layers.fused_moe.runner import moe_runner

    gpu = SimpleNamespace(is_tpu=lambda: False, is_cpu=lambda: False)
    monkeypatch.setattr(moe_runner, "current_platform", gpu)
    for shared, operator in ((None, "moe_forward"), (object(), "moe_forward_shared")):
        runner: Any = SimpleNamespace(_shared_experts=shared)
        chosen = moe_runner.MoERunner._select_forward(runner)
        assert chosen is getattr(torch.ops.vllm, operator)
    assert "self.routed_experts.forward_modular" in calls(moe_runner.MoERunner)


def test_breakable_graphs_are_segments_of_torchs_class() -> None:
    """The default of DeepSeek V3.2 and V4. Segments keep bound replays, made behind our wrap."""
    from vllm.compilation.breakable_cudagraph import (
        BreakableCUDAGraphCapture,
        BreakableCUDAGraphWrapper,
    )
    from vllm.config.vllm import DEFAULT_BREAKABLE_CUDAGRAPH_ARCHITECTURES
    from vllm.v1.worker import gpu_model_runner

    expected = {"DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM"}
    assert expected <= DEFAULT_BREAKABLE_CUDAGRAPH_ARCHITECTURES
    begin = calls(BreakableCUDAGraphCapture._begin_segment)
    assert {"torch.cuda.CUDAGraph", "g.capture_begin"} <= set(begin)
    end = ast.unparse(tree(BreakableCUDAGraphCapture._end_segment))
    assert end.index("self._current_graph.capture_end()") < end.index(
        "self.segments.append(self._current_graph.replay)"
    )
    assert "self.runnable" in calls(BreakableCUDAGraphWrapper._capture), "inside, with its hooks"
    assert "entry.capture.replay" in calls(BreakableCUDAGraphWrapper._replay)
    # Our hooks are on the module itself.
    assert "self.model.unwrap" in calls(gpu_model_runner.GPUModelRunner.get_model)


def test_layers_are_built_and_processed_inside_of_vllms_config_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels that are made there may ask for the config; where layers are bound, none is made."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.cpu_worker import CPUWorker

    import vllm_dwdp

    config, seen = SimpleNamespace(weight_transfer_config=None), []
    worker: Any = SimpleNamespace(
        _maybe_get_memory_pool_context=lambda tag: nullcontext(),
        _scoped_allocator_max_split=lambda max_split_size_mb: nullcontext(),
        vllm_config=config,
        model_runner=SimpleNamespace(
            load_model=lambda **_: seen.append(get_current_vllm_config_or_none())
        ),
    )
    monkeypatch.setattr(gpu_worker, "set_torch_threads_for_runtime", lambda: None)
    gpu_worker.Worker.load_model(worker)
    assert seen == [config]
    assert get_current_vllm_config_or_none() is None
    assert CPUWorker.load_model is gpu_worker.Worker.load_model
    package = Path(vllm_dwdp.__file__).parent
    makes_kernels = r"\bmoe\.(process|complete|around_processing)\("
    makers = {
        path.stem for path in package.rglob("*.py") if re.search(makes_kernels, path.read_text())
    }
    during_an_update = {"incoming"}  # in `reloading.building`, which sets the config
    assert makers - during_an_update == {"routed_experts", "twin"}, "when vLLM processes a layer"


def test_checksums_of_a_model_are_those_of_its_modules() -> None:
    """A key is a prefix of the rank, without which it is the path of the tensor."""
    import torch
    from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests
    from vllm.v1.worker.gpu_worker import Worker

    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    of_layer = {f"1.{name}": each for name, each in compute_tensor_digests(model[1]).items()}
    assert of_layer.items() <= compute_tensor_digests(model).items()
    assert set(of_layer) == {"1.weight", "1.bias"}
    assert "compute_tensor_digests" in calls(Worker.compute_weight_checksums)
    prefix = inspect.getsource(Worker._weight_checksum_prefix).rstrip()
    assert prefix.endswith(':"'), "names would not be told apart from the prefix"


def test_gpu_worker_hooks() -> None:
    from vllm.utils import mem_utils
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_dwdp.executor.gpu_worker import DwdpGPUWorker

    for name in ("load_model", "shutdown", "reload_weights", "update_weights"):
        assert callable(getattr(Worker, name))
        assert getattr(DwdpGPUWorker, name) is not getattr(Worker, name)
    assert "self.device" in dict(assignments(Worker.init_device))
    # Shards and slots are no torch memory: they are seen only because free memory is what counts.
    consumed = dict(assignments(mem_utils.memory_profiling))["result.total_consumed"]
    assert consumed == "result.before_create.free_memory - result.after_profile.free_memory"


def test_weights_held_outside_are_part_of_the_memory_budget_and_need_not_be_free() -> None:
    """A rank that returns finds its experts on its GPU: they must not refuse its start."""
    from vllm.config import CacheConfig, LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.utils import request_memory

    from vllm_dwdp.compat.worker.gpu import requested_bytes, weights_held_outside

    called = calls(Worker.init_device)
    (asks,) = [name for name in called if name.endswith(".get_external_weight_memory")]
    order = ["torch.device", asks, "request_memory"]
    assert [name for name in called if name in order] == order
    loader = get_model_loader(LoadConfig())
    with weights_held_outside(lambda: 30 * 10**9):
        kept_bytes = loader.get_external_weight_memory(None)
    assert loader.get_external_weight_memory(None) == 0
    snapshot: Any = SimpleNamespace(
        total_memory=80 * 10**9, free_memory=49 * 10**9, device_="cuda:0"
    )
    cache_config = CacheConfig(gpu_memory_utilization=0.9)
    with pytest.raises(ValueError, match="Free memory"):
        request_memory(snapshot, cache_config)
    assert request_memory(snapshot, cache_config, kept_bytes) == 42 * 10**9
    vllm_config = SimpleNamespace(cache_config=cache_config)
    assert requested_bytes(vllm_config, snapshot.total_memory) - kept_bytes == 42 * 10**9


def test_code_of_checkpoints_is_copied_by_one_function_that_is_looked_up_by_name() -> None:
    from transformers import dynamic_module_utils as stock
    from vllm.v1.engine.core import EngineCore

    copies = inspect.unwrap(stock.get_cached_module_file)
    assert "shutil.copyfile" in calls(copies)
    assert "get_cached_module_file" in calls(stock.get_class_from_dynamic_module)
    assert stock.get_class_from_dynamic_module.__globals__ is vars(stock)
    assert isinstance(stock.HF_MODULES_CACHE, str)
    # An engine loads its tokenizer when it has an executor, which is where we come in.
    order = ["executor_class", "StructuredOutputManager"]
    assert [name for name in calls(EngineCore.__init__) if name in order] == order


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

    from vllm_dwdp.entrypoints.launch.plan import RUST_FRONT_END

    assert RUST_FRONT_END in envs.environment_variables


class UsersOwn:
    """A middleware."""


def test_models_are_loaded_one_by_one_through_the_base_loader() -> None:
    """What numbers them, and so tells a drafter's layers from the target's."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    for loader in (DefaultModelLoader, DummyModelLoader):
        assert loader.load_model is BaseModelLoader.load_model
    names = calls(BaseModelLoader.load_model)
    assert names.count("self.create_model") == 1
    assert names.index("self.create_model") < names.index("self.load_weights")


def test_expert_parameters_carry_the_layers_own_weight_loader() -> None:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_dwdp.model_executor.routed_experts import DwdpRoutedExperts

    parameters = list(inspect.signature(RoutedExperts.weight_loader).parameters)
    assert parameters == list(inspect.signature(DwdpRoutedExperts.weight_loader).parameters)
    assert dict(entries(RoutedExperts.__init__))["weight_loader"] == "self.weight_loader"
    assert RoutedExperts.weight_loader.supports_moe_loading


def test_a_forward_knows_how_many_tokens_it_computes() -> None:
    """Both runners say it of every forward that is not captured whole."""
    from vllm.forward_context import BatchDescriptor, ForwardContext, override_forward_context

    from vllm_dwdp.compat.worker.forward import num_tokens_of_forward

    assert num_tokens_of_forward() is None
    facts: dict[str, Any] = {"no_compile_layers": {}, "attn_metadata": {}, "slot_mapping": {}}
    with override_forward_context(ForwardContext(**facts)):
        assert num_tokens_of_forward() is None
    descriptor = BatchDescriptor(num_tokens=24)
    with override_forward_context(ForwardContext(**facts, batch_descriptor=descriptor)):
        assert num_tokens_of_forward() == 24


def test_an_engine_process_is_made_by_a_context_that_can_be_another() -> None:
    """As `waiting_engine` puts one in place: asked for once, for one process per engine."""
    from vllm.v1.engine import utils

    made = calls(utils.CoreEngineProcManager.__init__)
    assert made.count("get_mp_context") == 1 and made.count("context.Process") == 1
    assert callable(utils.get_mp_context)


def test_what_vllm_adds_to_the_environment_of_engines_is_known_beforehand() -> None:
    """Of what is read while loading; otherwise no engine could be forked, and none would be."""
    script = (
        "import importlib, json, os; from vllm_dwdp.compat.frontend import loading; "
        "expected = loading.expected(os.environ); "
        "[importlib.import_module(name) for name in loading.MODULES]; "
        "loaded = os.environ | expected; importlib.import_module('vllm.config').VllmConfig(); "
        "print(json.dumps(loading.read_differently(loaded, os.environ)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(ended.stdout.splitlines()[-1]) == []


def nixl_answer(engine_id: str, **changes: Any) -> bytes:
    """Return what vLLM's connector answers at its side channel."""
    import msgspec
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
        NixlAgentMetadata,
        NixlHandshakePayload,
    )

    says: dict[str, Any] = {
        "engine_id": engine_id,
        "agent_metadata": b"",
        "kv_caches_base_addr": [1],
        "device_id": 0,
        "num_blocks": 4,
        "block_lens": [32, 64],
        "block_strides": [32, 64],
        "kv_cache_layout": "LBNHC",
        "block_size": 16,
        "ssm_sizes": (0, 0),
        "attn_backend_name": "CPU_ATTN",
        "physical_blocks_per_logical_kv_block": 1,
    }
    blocks = msgspec.msgpack.encode(NixlAgentMetadata(**says | changes))
    payload = NixlHandshakePayload(compatibility_hash="hash", agent_metadata_bytes=blocks)
    return bytes(msgspec.msgpack.encode(payload))


def test_vllm_tells_us_of_its_kv_blocks_as_it_tells_decode_servers() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler import (
        NixlBaseConnectorScheduler,
    )

    from vllm_dwdp.compat.frontend.nixl import Handshake, read_handshake
    from vllm_dwdp.entrypoints.launch.ports import free_ports

    (port,) = free_ports(1)
    ready, stop = threading.Event(), threading.Event()
    listener = threading.Thread(
        target=NixlBaseConnectorScheduler._nixl_handshake_listener,
        args=({(0, 0): nixl_answer("e")}, ready, stop, "127.0.0.1", port),
        daemon=True,
    )
    listener.start()
    assert ready.wait(10)
    try:
        assert read_handshake("127.0.0.1", port) == Handshake(
            settings_hash="hash",
            engine_id="e",
            backend="CPU_ATTN",
            layout="LBNHC",
            block_bytes=(32, 64),
        )
    finally:
        stop.set()
        listener.join(10)


def test_nobody_answers_at_a_side_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dwdp.compat.frontend import nixl
    from vllm_dwdp.entrypoints.launch.ports import free_ports

    monkeypatch.setattr(nixl, "ANSWER_TIMEOUT_S", 0.1)
    assert nixl.read_handshake("127.0.0.1", *free_ports(1)) is None


@pytest.mark.parametrize(
    ("given", "differs"),
    [
        ({"dtype": "float16"}, {"--dtype": ("bfloat16", "float16")}),
        (
            {"disable_hybrid_kv_cache_manager": True},
            {"--disable-hybrid-kv-cache-manager": ("False", "True")},
        ),
        ({"kv_cache_dtype": "fp8"}, {}),
    ],
)
def test_what_makes_two_nixl_hashes_differ_is_found(
    tmp_path: Path, given: dict[str, Any], differs: dict[str, Any]
) -> None:
    from vllm import EngineArgs
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
        compute_nixl_compatibility_hash,
    )

    from gpu_checks.checkpoints import make_checkpoint
    from vllm_dwdp.compat.frontend.nixl import Question, find_differences

    model = str(make_checkpoint(tmp_path / "model", "qwen3_moe", 4))

    def settings_hash(**options: Any) -> str:
        config = EngineArgs(model=model, max_model_len=512, **options).create_engine_config()
        return str(compute_nixl_compatibility_hash(config, "CPU_ATTN", transfer_mode="pull"))

    question = Question(
        arguments=(model, "--max-model-len", "512", "--served-model-name", "m", "--api-key", "k"),
        cache_dtype="auto",
        backend="CPU_ATTN",
        transfer_mode="pull",
        hashes=(settings_hash(), settings_hash(**given)),
    )
    assert find_differences(question) == differs

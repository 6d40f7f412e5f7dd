"""One contract per private vLLM name that `vllm_dwdp.compat` touches; see docs/compat.md.

An upgrade of vLLM that moves one of them fails here, by name, and not in a serving rank.
"""

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.compat


def source(thing: Any) -> str:
    return inspect.getsource(thing)


def test_vllm_is_in_the_tested_range() -> None:
    from packaging.version import Version
    from vllm.version import __version__

    assert Version("0.32") <= Version(__version__) < Version("0.33")


def test_engine_args_has_every_field_that_is_refused_with_the_neutral_value_as_default() -> None:
    from vllm import EngineArgs

    from vllm_dwdp.compat.frontend.refusals import REFUSED

    defaults = {field.name: field.default for field in dataclasses.fields(EngineArgs)}
    for field, flag, neutral, _ in REFUSED:
        assert field in defaults, f"{flag} has gone"
        default = defaults[field]
        if default is not dataclasses.MISSING:
            assert default in (neutral, None), f"{flag} is {default!r} when it is not given"


def test_engine_args_tells_spawned_api_servers_apart() -> None:
    from vllm import EngineArgs

    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert {"_api_process_count", "_api_process_rank", "worker_cls"} <= fields


def test_independence_is_keyed_on_is_moe() -> None:
    from vllm.config import ModelConfig
    from vllm.v1.engine import core

    assert isinstance(inspect.getattr_static(ModelConfig, "is_moe"), property)
    assert "model_config.is_moe" in source(core.EngineCoreProc.run_engine_core)
    assert "reconfigure_for_independent_dp_rank" in source(core.EngineCoreProc.run_engine_core)


def test_the_independent_config_pickles_by_reference() -> None:
    import pickletools

    from vllm_dwdp.compat.worker.independent import IndependentModelConfig

    strings = [
        argument
        for _, argument, _ in pickletools.genops(__import__("pickle").dumps(IndependentModelConfig))
        if isinstance(argument, str)
    ]
    assert strings == ["vllm_dwdp.compat.worker.independent", "IndependentModelConfig"]


def test_expert_map_fields() -> None:
    from vllm.model_executor.layers.fused_moe import config, expert_map_manager

    manager = source(expert_map_manager.ExpertMapManager)
    assert "self._local_num_experts" in manager
    assert "self._expert_map" in manager
    fields = {field.name for field in dataclasses.fields(config.FusedMoEConfig)}
    assert {"num_experts", "num_local_experts"} <= fields


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
    for name in ("update_expert_map_info", "forward_modular", "forward_monolithic"):
        assert callable(getattr(RoutedExperts, name))


def test_layer_registry() -> None:
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot

    assert isinstance(op_registry_oot, dict)
    assert "op_registry_oot" in source(PluggableLayer.__new__)


def test_weights_can_be_called_processed() -> None:
    from vllm.model_executor.utils import weights_already_processed

    with weights_already_processed():
        pass


def test_declared_quantisation_methods_exist_and_take_processed_weights() -> None:
    import pkgutil
    from importlib import import_module

    from vllm.model_executor.layers import fused_moe, quantization

    from vllm_dwdp.model_executor.expert_parameters import PER_EXPERT

    found: dict[str, Any] = {}
    for package in (fused_moe, quantization):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            if module.name.split(".")[-1] in ("fp8", "mxfp4", "unquantized_fused_moe_method"):
                found |= vars(import_module(module.name))
    for name in PER_EXPERT:
        assert name in found, f"{name} has gone"
        assert hasattr(found[name], "supports_pre_processed_weights")


def test_checkpoint_reader_hooks() -> None:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    parameters = list(inspect.signature(DefaultModelLoader._init_ep_weight_filter).parameters)
    assert parameters == ["self", "model_config"]
    assert "local_expert_ids" in source(DefaultModelLoader)
    assert callable(DefaultModelLoader.get_all_weights)


def test_wrappable_classes_exist() -> None:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_dwdp.compat.worker.moe import wrappable_classes

    assert all(issubclass(cls, RoutedExperts) for cls in wrappable_classes())


def test_cpu_worker_sizes_by_resident_memory() -> None:
    from vllm.v1.worker import cpu_worker

    assert "psutil.Process(" in source(cpu_worker)
    assert ".rss" in source(cpu_worker)


def test_cpu_binding_variable() -> None:
    from vllm import envs

    from vllm_dwdp.compat.worker.cpu import BIND_ENV

    assert BIND_ENV in envs.environment_variables
    assert envs.environment_variables[BIND_ENV]() == "auto"


def test_stat_logger_factories_are_looked_up_by_name() -> None:
    from vllm.v1.engine import async_llm

    assert "load_stat_logger_plugin_factories()" in source(async_llm.AsyncLLM)


def test_start_up_wait_is_looked_up_by_name_and_interrupts_are_swallowed() -> None:
    """The second half fails when the shim can go."""
    from vllm.utils import network_utils
    from vllm.v1.engine import utils

    assert "wait_for_engine_startup(" in source(utils.launch_core_engines)
    assert "except KeyboardInterrupt" in source(network_utils.zmq_socket_ctx)


def test_offline_client_members() -> None:
    from vllm.v1.engine import core_client

    client = source(core_client)
    for name in (
        "core_engines",
        "utility_results",
        "outputs_queue",
        "input_socket",
        "engine_manager",
        "engine_dead",
        "_format_exception",
    ):
        assert name in client, name
    parameters = list(inspect.signature(core_client.EngineCoreClient.make_client).parameters)
    assert parameters[:5] == [
        "multiprocess_mode",
        "asyncio_mode",
        "vllm_config",
        "executor_class",
        "log_stats",
    ]


def test_executor_and_worker_hooks() -> None:
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.worker.cpu_worker import CPUWorker

    assert callable(MultiprocExecutor._init_executor)
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


def test_on_gpus_the_layer_is_called_inside_an_opaque_operator() -> None:
    """There wait and record run eagerly, also during capture, and are never traced."""
    from vllm.model_executor.layers.fused_moe.runner import moe_runner

    assert "torch.ops.vllm.moe_forward" in source(moe_runner.MoERunner._select_forward)
    assert "self.routed_experts.forward_modular(" in source(moe_runner)


def test_gpu_worker_hooks() -> None:
    from vllm.utils import mem_utils
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_dwdp.executor.gpu_worker import DwdpGPUWorker

    for name in ("load_model", "shutdown", "reload_weights", "sleep"):
        assert callable(getattr(Worker, name))
        assert getattr(DwdpGPUWorker, name) is not getattr(Worker, name)
    assert "self.device = torch.device(" in source(Worker.init_device)
    # Shards and slots are no torch memory: they are seen only because free memory is what counts.
    assert "before_create.free_memory - result.after_profile.free_memory" in source(mem_utils)


def test_weights_held_outside_are_part_of_the_memory_budget_and_need_not_be_free() -> None:
    """A rank that returns finds its experts on its GPU: they must not refuse its start."""
    from types import SimpleNamespace

    from vllm.config import CacheConfig, LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.utils import request_memory

    from vllm_dwdp.compat.worker.gpu import weights_held_outside

    text = source(Worker.init_device)
    asked = text.index("get_external_weight_memory(self.vllm_config)")
    assert text.index("self.device = torch.device(") < asked < text.index("= request_memory(")
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


def test_models_are_loaded_one_by_one_through_the_base_loader() -> None:
    """What numbers them, and so tells a drafter's layers from the target's."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    for loader in (DefaultModelLoader, DummyModelLoader):
        assert loader.load_model is BaseModelLoader.load_model
    assert "self.create_model(" in source(BaseModelLoader.load_model)


def test_expert_parameters_carry_the_layers_own_weight_loader() -> None:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_dwdp.model_executor.routed_experts import DwdpRoutedExperts

    parameters = list(inspect.signature(RoutedExperts.weight_loader).parameters)
    assert parameters == list(inspect.signature(DwdpRoutedExperts.weight_loader).parameters)
    assert '"weight_loader": self.weight_loader' in source(RoutedExperts)
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

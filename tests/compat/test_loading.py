"""How vLLM builds, reads and processes layers of experts."""

import ast
import inspect
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.compat.syntax import calls, entries
from tests.compat.versions import vllm_minor

pytestmark = pytest.mark.compat


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


def test_a_layers_config_says_into_how_many_slices_it_is_cut() -> None:
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
    )

    assert "moe_parallel_config" in FusedMoEConfig.__dataclass_fields__
    assert "tp_size" in FusedMoEParallelConfig.__dataclass_fields__


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

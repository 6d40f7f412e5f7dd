"""What vLLM's reload leaves alone, and what is put back when one is given up."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from vllm_dwdp.compat.worker import reloading


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4), requires_grad=False)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.experts = Layer(), Layer()

    def load_weights(self, weights: Any) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            parameter = self.get_parameter(name)
            getattr(parameter, "weight_loader", copy)(parameter, tensor)
            loaded.add(name)
        return loaded


def copy(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    param.data.copy_(loaded_weight)


@pytest.fixture
def model() -> Model:
    made = Model()
    for layer in (made.dense, made.experts):
        layer.weight.weight_loader = copy  # type: ignore[attr-defined]
    record_metadata_for_reloading(made)
    return made


CONFIG: Any = SimpleNamespace(dtype=torch.float32)


def test_a_hidden_layer_is_loaded_directly_and_keeps_its_tensors(model: Model) -> None:
    stock, incoming = model.experts, Layer()
    reloading.exchange(model, {stock: incoming})
    assert model.experts is incoming
    weight = incoming.weight
    reloading.hide(incoming)
    initialize_layerwise_reload(model)
    assert model.dense.weight.is_meta and incoming.weight is weight
    seen: list[str] = []
    with reloading.watched_loading(
        model, lambda: reloading.show(incoming), lambda name, tensor: seen.append(name)
    ):
        model.load_weights(
            [("dense.weight", torch.full((4,), 2.0)), ("experts.weight", torch.full((4,), 3.0))]
        )
    assert seen == ["dense.weight", "experts.weight"]
    finalize_layerwise_reload(model, CONFIG)
    assert incoming.weight is weight, "neither reset nor processed"
    assert weight.tolist() == [3.0] * 4
    reloading.exchange(model, {incoming: stock})
    assert model.experts is stock and stock.weight.tolist() == [1.0] * 4
    assert model.dense.weight.tolist() == [2.0] * 4
    assert "load_weights" not in vars(model)


def test_a_reload_that_is_given_up_leaves_nothing_to_the_next(model: Model) -> None:
    weight = model.dense.weight
    initialize_layerwise_reload(model)
    assert model.dense.weight.is_meta
    reloading.abandon(model)
    assert model.dense.weight is weight and weight.tolist() == [1.0] * 4
    initialize_layerwise_reload(model)
    model.load_weights([("dense.weight", torch.full((4,), 5.0))])
    finalize_layerwise_reload(model, CONFIG)
    assert weight.tolist() == [5.0] * 4


def test_what_a_model_copies_past_its_loaders_arrives(model: Model) -> None:
    """As gpt-oss does its sinks; stock vLLM's reload loses it."""
    weight = model.dense.weight
    plain = reloading.plain_layers(model)
    assert plain == [model.dense, model.experts]
    for module in plain:
        reloading.hide(module)
    initialize_layerwise_reload(model)
    for module in plain:
        reloading.show(module)
    model.dense.weight.data.copy_(torch.full((4,), 6.0))
    finalize_layerwise_reload(model, CONFIG)
    assert model.dense.weight is weight and weight.tolist() == [6.0] * 4


def test_an_engine_asks_its_workers_before_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.core import EngineCore

    resumed: list[Any] = []
    monkeypatch.setattr(EngineCore, "resume_scheduler", resumed.append)
    for _ in range(2):
        reloading.check_before_resuming()
    asked: list[str] = []
    stock = SimpleNamespace(model_executor=SimpleNamespace())
    ours = SimpleNamespace(
        model_executor=SimpleNamespace(check_weights=lambda: asked.append("workers"))
    )
    for engine in (stock, ours):
        EngineCore.resume_scheduler(engine)  # type: ignore[arg-type]
    assert resumed == [stock, ours] and asked == ["workers"]

    def refuse() -> None:
        raise RuntimeError("half-way")

    ours.model_executor.check_weights = refuse
    with pytest.raises(RuntimeError, match="half-way"):
        EngineCore.resume_scheduler(ours)  # type: ignore[arg-type]
    assert resumed == [stock, ours]

"""Whatever way a layer holds a tensor, the walk finds it; what is not the layer's it leaves alone."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dwdp.compat.worker.reachable import ENTERED, reachable_numbers, reachable_tensors

KERNELS = ENTERED[0] + ".stand_in"


@dataclass
class Config:
    """A dataclass of a kernel."""

    w1_scale: torch.Tensor
    alpha: float = 1.5


class Slotted:
    """A wrapper with slots."""

    __slots__ = ("storage", "unset")

    def __init__(self, storage: torch.Tensor) -> None:
        self.storage = storage


class Kernel:
    """Holds tensors in every way that vLLM's do."""

    def __init__(self) -> None:
        self.config = Config(torch.ones(2))
        self.listed = [torch.ones(3), {"inner": torch.ones(4)}]
        self.wrapped = Slotted(torch.ones(5))
        self.partial = functools.partial(max, torch.ones(6), key=torch.ones(7))
        self.method = Bound(torch.ones(8)).run
        self.closure = enclosing(torch.ones(9))
        self.itself = self


class Bound:
    """Its method is held."""

    def __init__(self, kept: torch.Tensor) -> None:
        self.kept = kept

    def run(self) -> None: ...


def enclosing(kept: torch.Tensor) -> Any:
    def closure() -> torch.Tensor:
        return kept

    return closure


class Elsewhere:
    """Not of vLLM's kernels: the model, the process."""

    def __init__(self) -> None:
        self.tensor = torch.ones(99)


def make_layer() -> torch.nn.Module:
    for each in (Config, Slotted, Kernel, Bound):
        each.__module__ = KERNELS
    layer = torch.nn.Module()
    layer.w13_weight = torch.nn.Parameter(torch.ones(10), requires_grad=False)
    layer.w13_alias = layer.w13_weight
    layer.register_buffer("stride", torch.ones(11))
    layer.method: Any = Kernel()
    layer.method.closure.__module__ = KERNELS
    layer.attribute = layer.w13_weight.data[2:]
    layer.model = Elsewhere()
    other = torch.nn.Module()
    other.quant_method = Kernel()
    layer.other = [other]
    return layer


def test_every_way_to_hold_a_tensor() -> None:
    layer = make_layer()
    found = reachable_tensors(layer)
    assert {path: tensor.numel() for path, tensor in found.items()} == {
        "w13_weight": 10,
        "stride": 11,
        "method.config.w1_scale": 2,
        "method.listed.0": 3,
        "method.listed.1.inner": 4,
        "method.wrapped.storage": 5,
        "method.partial.args.0": 6,
        "method.partial.keywords.key": 7,
        "method.method.__self__.kept": 8,
        "method.closure.kept": 9,
        "attribute": 8,
        "attribute._base": 10,
    }
    assert reachable_numbers(layer) == {"method.config.alpha": 1.5}


def test_the_order_is_that_of_the_code_not_of_the_memory() -> None:
    """Ranks compare layers by it."""
    assert list(reachable_tensors(make_layer())) == list(reachable_tensors(make_layer()))

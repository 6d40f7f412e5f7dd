"""Nothing that holds a tensor is passed over."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from tests.formats.walk import numbers_of, tensors_of


class Slots:
    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner


@dataclass
class Fields:
    inner: Any

    def method(self) -> None: ...


def layer_with(value: Any) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.held = value
    return layer


def test_whatever_holds_a_tensor_is_opened() -> None:
    tensor = torch.zeros(2)
    holders: list[Any] = [
        Slots(tensor),
        Fields(tensor),
        {"key": tensor},
        [(tensor,)],
        functools.partial(print, tensor),
        functools.partial(print, key=tensor),
        Fields(tensor).method,
        torch.nn.Parameter(tensor),
        layer_with(layer_with(tensor)),
    ]
    for holder in holders:
        found = tensors_of(layer_with(holder)).values()
        assert any(each.data_ptr() == tensor.data_ptr() for each in found), holder


def test_parameters_and_buffers_have_their_own_names() -> None:
    layer = torch.nn.Linear(2, 3)
    layer.register_buffer("counts", torch.zeros(1))
    layer.again = layer.weight
    assert set(tensors_of(layer)) == {"layer.weight", "layer.bias", "layer.counts"}


def test_what_a_view_is_a_view_of_is_found() -> None:
    whole = torch.zeros(4, 2)
    found = tensors_of(layer_with(whole[1:]))
    assert found["layer.held._base"] is whole


def test_circles_end_and_numbers_are_found() -> None:
    layer = layer_with({"scale": 2.5})
    layer.myself = [layer]
    assert numbers_of(layer)["layer.held['scale']"] == 2.5

"""What a processed fused-MoE layer holds: tensors, and numbers that a reduction left in Python.

Kernels keep weights in many places: the layer's parameters, the quantisation method, the kernel and its
config, containers and wrappers in them. They are found by walking, so that none needs to be declared.
Only objects of vLLM's MoE and quantisation packages are entered: what lies outside describes the model
or the process, not this layer's experts.
"""

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch

ENTERED = (
    "vllm.model_executor.layers.fused_moe",
    "vllm.model_executor.layers.quantization",
    "vllm.third_party.triton_kernels",
    "triton_kernels",
)
"""Packages whose objects may hold a layer's experts."""

_MODULE_TABLES = ("_parameters", "_buffers", "_modules")


def reachable_tensors(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the layer by the path on which it was first met; the order is that of the walk."""
    return {path: value for path, value in _walk(layer) if isinstance(value, torch.Tensor)}


def reachable_numbers(layer: torch.nn.Module) -> dict[str, float]:
    """Every float of the layer by its path: scales that were reduced to a number."""
    return {path: value for path, value in _walk(layer) if isinstance(value, float)}


def _walk(layer: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    seen = {id(layer)}
    pending = [("", child) for child in reversed(list(_members(layer)))]
    while pending:
        prefix, (name, value) = pending.pop()
        path = f"{prefix}{name}"
        if isinstance(value, float):
            yield path, value
            continue
        if id(value) in seen or not _is_entered(value):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield path, value
        pending += [(f"{path}.", child) for child in reversed(list(_members(value)))]


def _is_entered(value: Any) -> bool:
    if isinstance(value, torch.Tensor | dict | list | tuple | functools.partial | types.MethodType):
        return True
    if isinstance(value, torch.nn.Module) and "quant_method" in vars(value):
        return False  # another layer
    if isinstance(value, type | types.ModuleType):
        return False
    home = value.__module__ if isinstance(value, types.FunctionType) else type(value).__module__
    return str(home).startswith(ENTERED)


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what `value` holds directly, by name."""
    if isinstance(value, torch.Tensor):
        if value._base is not None:  # held in C++, so that no attribute shows it
            yield "_base", value._base
        yield from ((k, v) for k, v in vars(value).items() if isinstance(v, torch.Tensor))
    elif isinstance(value, dict):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(index), item) for index, item in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield "__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        yield from ((name, cell.cell_contents) for name, cell in cells)
    else:
        yield from _attributes(value)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    attributes = getattr(value, "__dict__", {})
    for table in _MODULE_TABLES:  # of a torch module: their names are attributes of it
        if isinstance(attributes.get(table), dict):
            yield from attributes[table].items()
    yield from ((name, item) for name, item in attributes.items() if name not in _MODULE_TABLES)
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield name, getattr(value, name)

"""Every tensor and number that can be reached from a layer, by the path that leads to it."""

import dataclasses
import enum
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch

OPAQUE = (str, bytes, type, enum.Enum, torch.dtype, torch.device, types.ModuleType)
"""What holds no tensor, or is shared by everybody."""


def tensors_of(root: Any) -> dict[str, torch.Tensor]:
    """Return the tensors by path; one that is reached twice has its first path."""
    return {path: each for path, each in reached(root) if isinstance(each, torch.Tensor)}


def numbers_of(root: Any) -> dict[str, int | float]:
    """Return the numbers by path."""
    return {path: each for path, each in reached(root) if isinstance(each, int | float)}


def reached(root: Any) -> Iterator[tuple[str, Any]]:
    """Walk over everything that is held, once.

    Attributes, slots, dataclass fields, containers, partial functions, bound methods, and the tensors of
    which others are views, which only C++ holds.
    """
    seen: dict[int, Any] = {}
    waiting = [("layer", root)]
    while waiting:
        path, value = waiting.pop(0)
        if isinstance(value, int | float):
            yield path, value
            continue
        if value is None or isinstance(value, OPAQUE) or id(value) in seen:
            continue
        seen[id(value)] = value  # alive, so that its id stays its own
        yield path, value
        if isinstance(value, torch.Tensor):
            waiting.append((f"{path}._base", value._base))
        waiting += _held_by(value, path)


def _held_by(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"{path}[{key!r}]", each) for key, each in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"{path}[{number}]", each) for number, each in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from _held_by((*value.args, value.keywords, value.func), path)
    elif isinstance(value, types.MethodType):
        yield f"{path}.__self__", value.__self__
    elif not isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        yield from ((f"{path}.{name}", each) for name, each in _attributes(value).items())


def _attributes(value: Any) -> dict[str, Any]:
    if isinstance(value, torch.nn.Module):
        value = types.SimpleNamespace(
            **value._parameters,
            **value._buffers,
            **value._modules,
            **{key: each for key, each in vars(value).items() if key not in MODULE_OWN},
        )
    held = dict(getattr(value, "__dict__", {}))
    names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    if dataclasses.is_dataclass(value):
        names += [field.name for field in dataclasses.fields(value)]
    return held | {name: getattr(value, name, None) for name in names if name not in held}


MODULE_OWN = frozenset(vars(torch.nn.Module()))
"""Of every module: its dictionaries, which are opened above, and its hooks."""

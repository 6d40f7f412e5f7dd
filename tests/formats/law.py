"""The law that sharing experts rests on, tried on one layer of a method and kernel.

A layer is processed with the large rows of other ranks zero. Every tensor that is reachable from it
afterwards is either the same as the whole layer's, on every rank, or has its experts outermost and, for
the experts of its rank, the same rows.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tests.formats.layers import NUM_EXPERTS, Choice, choosing, fill, make_layer
from tests.formats.operations import replaced_operations
from tests.formats.walk import numbers_of, tensors_of
from vllm_dwdp.layout.placement import ExpertRange

RANKS = (ExpertRange(0, 3), ExpertRange(3, 4), ExpertRange(4, NUM_EXPERTS))
"""Uneven shares."""
HOPPER, BLACKWELL = (9, 0), (10, 0)
LARGE_BYTES = (16, 4096)
"""Of one expert of a raw parameter, from which on other ranks' rows are zero while a layer is processed.

The larger is what a rank decides by; with the smaller the scales of these small layers are treated as
those of real ones, of which only one or two numbers for each expert are small.
"""


@dataclass(frozen=True, kw_only=True)
class Held:
    """What can be reached from a layer, by path."""

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, int | float]

    @classmethod
    def by(cls, layer: Any) -> "Held":
        return cls(tensors=tensors_of(layer), numbers=numbers_of(layer))


class Broken(Exception):
    """A tensor that is neither the same everywhere nor its owners' rows."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the tensors of a processed layer are, by path."""

    shared: tuple[str, ...]
    replicated: tuple[str, ...]


def try_law(method: str, choice: Choice, capability: tuple[int, int]) -> Finding:
    """Compare the whole layer with one for each rank, as large as it is and as if it were larger.

    Raises:
        Broken: it does not hold.
    """
    with processing(choice, capability):
        whole = Held.by(process(method))
        findings = [
            compare(whole, [Held.by(process(method, rank, large)) for rank in RANKS])
            for large in LARGE_BYTES
        ]
    return findings[0]


def compare(whole: Held, parts: list[Held]) -> Finding:
    """Sort the tensors of a whole layer by what the ranks' are.

    Raises:
        Broken: one is neither the same everywhere nor its owners' rows, or a number differs.
    """
    for part in parts:
        if part.tensors.keys() != whole.tensors.keys():
            raise Broken(f"other tensors: {sorted(part.tensors.keys() ^ whole.tensors.keys())}")
        if part.numbers != whole.numbers:
            raise Broken(f"other numbers: {dict(part.numbers.items() ^ whole.numbers.items())}")
    shared, replicated = [], []
    for path, tensor in whole.tensors.items():
        each = [part.tensors[path] for part in parts]
        if all(are_equal(tensor, other) for other in each):
            replicated.append(path)
        elif holds_rows(tensor, each):
            shared.append(path)
        else:
            raise Broken(f"{path} {tuple(tensor.shape)} {tensor.stride()}")
    return Finding(shared=tuple(shared), replicated=tuple(replicated))


@contextlib.contextmanager
def processing(choice: Choice | None, capability: tuple[int, int]) -> Iterator[None]:
    """While active, layers are built and processed for `choice`, or vLLM's, as on such a GPU."""
    with contextlib.ExitStack() as stack:
        if choice is None or "CPU" not in choice.backend.name:
            stack.enter_context(replaced_operations(capability))
        if choice is not None:
            stack.enter_context(choosing(choice))
        yield


def process(method: str, rank: ExpertRange | None = None, large_bytes: int = 0) -> Any:
    """Build, fill and process a layer; for a rank, the others' rows of large parameters are zero."""
    layer = make_layer(method)
    fill(layer)
    if rank is not None:
        for parameter in layer.parameters():
            if parameter.shape[:1] == (NUM_EXPERTS,) and parameter[0].nbytes >= large_bytes:
                parameter.data[: rank.start].zero_()
                parameter.data[rank.stop :].zero_()
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether layouts and bits are the same."""
    layouts = [(each.shape, each.stride(), each.dtype) for each in (one, other)]
    return layouts[0] == layouts[1] and torch.equal(bits(one), bits(other))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def expert_dimension(tensor: torch.Tensor) -> int | None:
    """The outermost dimension in memory, if its size is the number of experts."""
    if not tensor.dim():
        return None
    outermost = max(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.shape[dim]))
    return outermost if tensor.shape[outermost] == NUM_EXPERTS else None


def holds_rows(whole: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Whether every rank has its own experts' rows as the whole layer has them."""
    dim = expert_dimension(whole)
    if dim is None:
        return False
    return all(
        part.shape == whole.shape
        and part.stride() == whole.stride()
        and torch.equal(
            bits(part.narrow(dim, rank.start, rank.stop - rank.start)),
            bits(whole.narrow(dim, rank.start, rank.stop - rank.start)),
        )
        for part, rank in zip(parts, RANKS, strict=True)
    )

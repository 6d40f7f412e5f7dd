"""The law that sharing experts rests on, tried on one layer of a method and kernel.

A layer is loaded and processed as the product does it: with the large rows of other ranks zero. Every
tensor that is reachable from it afterwards is either the same as the whole layer's, on every rank, or
has its experts outermost and, for the experts of its rank, the same rows. Its twin finds the same, and
when the experts are handed over, nothing keeps their memory.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from tests.formats.layers import NUM_EXPERTS, Choice, choosing, fill, make_layer
from tests.formats.operations import replaced_operations
from vllm_dwdp.compat.worker import moe
from vllm_dwdp.errors import DwdpUnsupportedError
from vllm_dwdp.layout.placement import ExpertRange
from vllm_dwdp.model_executor import raw_parameters
from vllm_dwdp.model_executor.processed_layer import Findings, ProcessedLayer
from vllm_dwdp.model_executor.raw_parameters import RawParameters, bytes_of
from vllm_dwdp.model_executor.relocation import WatchedStorage
from vllm_dwdp.model_executor.twin import LayerTwin, check_same

RANKS = (ExpertRange(0, 3), ExpertRange(3, 4), ExpertRange(4, NUM_EXPERTS))
"""Uneven shares."""
CPU = torch.device("cpu")
HOPPER, BLACKWELL = (9, 0), (10, 0)
LARGE_BYTES, SMALLER_BYTES = 4096, 16
"""Of one expert of a raw parameter, from which on a rank loads its own only.

The larger is what the product decides by; with the smaller the scales of these small layers are treated
as those of real ones, of which only one or two numbers for each expert are small.
"""


class Broken(Exception):
    """A tensor that is neither the same everywhere nor its owners' rows."""


@dataclass(frozen=True, kw_only=True)
class Processed:
    """A layer that vLLM has processed.

    Args:
        rank: whose experts were loaded; all for the whole layer.
        twin: what the rank's twin of it found.
        watched: memory that it had before.
    """

    layer: Any
    rank: ExpertRange | None = None
    twin: Findings | None = None
    watched: tuple[WatchedStorage, ...] = ()

    def look(self) -> ProcessedLayer:
        """Return what it holds now."""
        return ProcessedLayer(self.layer, CPU, self.watched)

    def hand_over(self) -> None:
        """Let the experts go, as when they are moved into a shard."""
        looked = self.look()
        looked.hand_over(list(looked.tensors.per_expert), [], lambda rows: None)


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
        whole = process(method)
        parts = [process(method, rank, LARGE_BYTES) for rank in RANKS]
        return compare(whole, [*parts, process(method, RANKS[0], SMALLER_BYTES)])


def compare(whole: Processed, parts: list[Processed]) -> Finding:
    """Sort the tensors of a whole layer, and compare what each rank provides with it.

    Raises:
        Broken: a rank's rows or what is replicated differ, its twin's too, or its memory is kept.
    """
    try:
        tensors = whole.look().tensors
        for part in parts:
            assert part.rank is not None
            if part.twin is not None:
                check_same("twin", part.twin, part.look().independent_of_others(part.rank))
            expected = whole.look().independent_of_others(part.rank)
            check_same("whole", expected, part.look().independent_of_others(part.rank))
            part.hand_over()
    except DwdpUnsupportedError as error:
        raise Broken(str(error)) from error
    return Finding(
        shared=tuple(placed.path for rows in tensors.per_expert for placed in rows.tensors),
        replicated=tuple(tensors.replicated),
    )


@contextlib.contextmanager
def processing(choice: Choice | None, capability: tuple[int, int]) -> Iterator[None]:
    """While active, layers are built and processed for `choice`, or vLLM's, as on such a GPU."""
    with contextlib.ExitStack() as stack:
        # As vLLM's CPU worker has it; without one a method may fail for want of a GPU.
        stack.enter_context(mock.patch("torch.accelerator.empty_cache", return_value=None))
        if choice is None or "CPU" not in choice.backend.name:
            stack.enter_context(replaced_operations(capability))
        if choice is not None:
            stack.enter_context(choosing(choice))
        yield


def process(method: str, rank: ExpertRange | None = None, large_bytes: int = 0) -> Processed:
    """Build, fill and process a layer; for a rank, with its experts of large parameters only."""
    layer = make_layer(method)
    fill(layer)
    if rank is None:
        moe.process(layer)
        return Processed(layer=layer)
    filled = {name: each.data.clone() for name, each in layer.named_parameters()}
    with mock.patch.object(raw_parameters, "LARGE_ROW_BYTES", large_bytes):
        raw = RawParameters(layer, NUM_EXPERTS, rank)
        twin = LayerTwin(make_layer(method), layer)
    for name, parameter in raw.large.items():
        bytes_of(parameter.data).copy_(bytes_of(filled[name][rank.start : rank.stop]))
    found = twin.process(raw, CPU)
    watched = raw.make_whole()
    del parameter
    moe.process(layer)
    return Processed(layer=layer, rank=rank, twin=found, watched=tuple(watched))

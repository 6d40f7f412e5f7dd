"""Wait and record around a layer's kernels, in eager code and inside compiled graphs.

Dynamo traces vLLM's CPU layers, so inside a graph the two must be operators; each declares that it
mutates a tensor that the kernels read or write, which is what keeps the compiler from moving them.
Rings are addressed by number because operators take no Python objects.
"""

from collections.abc import Sequence

import torch

from vllm_dwdp.prefetch.captured_ring import CapturedRing
from vllm_dwdp.prefetch.ring import Ring

_rings: list[Ring | CapturedRing] = []


def install_rings(rings: Sequence[Ring | CapturedRing]) -> None:
    """Make `rings` the ones that the operators address; an empty list removes them."""
    _rings[:] = rings


def wait_layer(hidden_states: torch.Tensor, ring: int, index: int) -> None:
    """Hold the layer's input back until the layer's experts are in their slot.

    Args:
        hidden_states: the layer's input, of any shape; it is not read.
        ring: number of the ring, as installed.
        index: of the layer within the ring.
    """
    if torch.compiler.is_compiling():
        torch.ops.vllm_dwdp.wait_layer(hidden_states, ring, index)
    else:
        _wait(ring, index)


def record_layer(output: torch.Tensor, ring: int, index: int) -> None:
    """Mark, after `output` was produced, that the layer's slot may be refilled.

    Args:
        output: what the layer's kernels wrote, of any shape; it is not read.
        ring: number of the ring, as installed.
        index: of the layer within the ring.
    """
    if torch.compiler.is_compiling():
        torch.ops.vllm_dwdp.record_layer(output, ring, index)
    else:
        _rings[ring].record(index)


def _wait_layer(hidden_states: torch.Tensor, ring: int, index: int) -> None:
    _wait(ring, index)


def _record_layer(output: torch.Tensor, ring: int, index: int) -> None:
    _rings[ring].record(index)


def _wait(ring: int, index: int) -> None:
    """While a profiler runs, each wait is a range named after its ring and layer."""
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(f"dwdp::wait ring {ring} layer {index}"):
            _rings[ring].wait(index)
    else:
        _rings[ring].wait(index)


def _fake(tensor: torch.Tensor, ring: int, index: int) -> None:
    return None


_library = torch.library.Library("vllm_dwdp", "DEF")
for _name, _function, _argument in (
    ("wait_layer", _wait_layer, "hidden_states"),
    ("record_layer", _record_layer, "output"),
):
    _library.define(f"{_name}(Tensor(a!) {_argument}, int ring, int index) -> ()")
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vllm_dwdp::{_name}", _fake, lib=_library)

"""vLLM's CPU kernels compute, from checkpoints in published formats, what the bf16 weights would.

So the files mean what we think: scales, zero points, packing, order.
"""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gpu_checks.quantised import FORMATS
from tests.formats import law
from tests.formats.layers import HIDDEN, INTERMEDIATE, NUM_EXPERTS, Choice, make_layer
from tests.formats.pairs import pairs_of
from tests.helpers import cpu_gates

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(cpu_gates.why_not() is not None, reason=str(cpu_gates.why_not())),
]

NAME = "model.layers.0.mlp.experts"
GREATEST_ERROR = {"fp8_block": 0.06, "ct_int8": 0.04, "ct_int4": 0.25, "gptq": 0.25, "awq": 0.25}
"""Of the output, relative: four bits of random weights leave that much."""


def experts() -> dict[str, torch.Tensor]:
    """Return a layer's experts in bf16, by the names of a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "gate_proj": (INTERMEDIATE, HIDDEN),
        "up_proj": (INTERMEDIATE, HIDDEN),
        "down_proj": (HIDDEN, INTERMEDIATE),
    }
    return {
        f"{NAME}.{expert}.{name}.weight": torch.randn(shape, generator=generator).bfloat16() / 8
        for expert in range(NUM_EXPERTS)
        for name, shape in shapes.items()
    }


def reference(x: torch.Tensor, expert: int, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    gate, up, down = (
        weights[f"{NAME}.{expert}.{name}.weight"].float()
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    return (F.silu(x.float() @ gate.T) * (x.float() @ up.T)) @ down.T


def cpu_kernel(method: str) -> Choice:
    """Return the kernel that this processor runs."""
    with law.processing(None, law.BLACKWELL):
        found = [pair.choice for pair in pairs_of(method) if pair.backend == "CPU" and pair.choice]
    (choice,) = found
    return choice


@pytest.mark.parametrize("method", GREATEST_ERROR)
def test_what_the_kernel_computes_is_what_the_weights_say(method: str) -> None:
    weights = experts()
    x = torch.randn(NUM_EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    routed = torch.arange(NUM_EXPERTS, dtype=torch.int32).unsqueeze(1)
    with law.processing(cpu_kernel(method), law.BLACKWELL):
        layer: Any = make_layer(method)
        written = FORMATS[method].rewrite(weights)
        loaded = layer.load_weights(
            (name.removeprefix(f"{NAME}."), tensor)
            for name, tensor in written.items()
            if not name.endswith("g_idx")  # which a model's loader skips, in the order of inputs
        )
        assert len(list(loaded)) > 0
        layer.quant_method.process_weights_after_loading(layer)
        context = importlib.import_module("vllm.forward_context")
        with context.set_forward_context(None, _config()):
            output = layer.quant_method.apply(
                layer, x, torch.ones(NUM_EXPERTS, 1), routed, None, None
            )
    right = torch.cat(
        [reference(x[expert : expert + 1], expert, weights) for expert in range(NUM_EXPERTS)]
    )
    error = float((output.float() - right).norm() / right.norm())
    assert error < GREATEST_ERROR[method]


def _config() -> Any:
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config()

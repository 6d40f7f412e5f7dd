"""DBRX: its own loader of whole tensors of experts, and their number, which vLLM does not find."""

import math
from typing import Any

import pytest
import torch

from vllm_dwdp.compat.frontend.expert_count import counted_in_parts
from vllm_dwdp.errors import WeightUpdateError
from vllm_dwdp.layout.placement import ExpertRange
from vllm_dwdp.model_executor.incoming import _check_complete
from vllm_dwdp.model_executor.raw_parameters import LoadsRawParameters, RawParameters

pytestmark = pytest.mark.compat

NUM_EXPERTS, INTERMEDIATE, HIDDEN = 5, 48, 64
PARAMETERS = {"w1": "w13_weight", "v1": "w13_weight", "w2": "w2_weight"}
"""Where the parts of a checkpoint's experts go."""


def test_its_experts_are_in_a_part_of_the_config() -> None:
    """Once stock vLLM counts them, `expert_count` can go."""
    import vllm.config  # noqa: F401  the convertor is half-way through importing it otherwise
    from transformers import DbrxConfig
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    config = DbrxConfig(ffn_config={"moe_num_experts": NUM_EXPERTS})
    convertor = ModelArchConfigConvertorBase(config, config)
    assert convertor.get_num_experts() == 0
    with counted_in_parts():
        assert convertor.get_num_experts() == NUM_EXPERTS
    assert convertor.get_num_experts() == 0


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> type[torch.nn.Module]:
    """DBRX' layer with its loader, its parameters and nothing else."""
    from vllm.model_executor.models import dbrx

    monkeypatch.setattr(dbrx, "get_tensor_model_parallel_rank", lambda: 0)

    class Stock(dbrx.DbrxExperts):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.tp_size, self.d_model, self.intermediate_size = 1, HIDDEN, INTERMEDIATE
            shapes = {"w13_weight": (2 * INTERMEDIATE, HIDDEN), "w2_weight": (HIDDEN, INTERMEDIATE)}
            for name, shape in shapes.items():
                whole = torch.nn.Parameter(torch.zeros(NUM_EXPERTS, *shape))
                self.register_parameter(name, whole)

        def __new__(cls) -> "Stock":
            return object.__new__(cls)

    return Stock


def sharded(stock: type[torch.nn.Module], resident: ExpertRange) -> Any:
    layer: Any = type("Ours", (LoadsRawParameters, stock), {})()
    layer.raw = RawParameters(layer, NUM_EXPERTS, resident)
    return layer


def load(layer: Any, *parts: str) -> None:
    """Load `[num_experts * intermediate_size, hidden_size]` of each, as the model's loader does."""
    for part in parts:
        name = PARAMETERS[part]
        layer.weight_loader(getattr(layer, name), weight_of(part), f"mlp.{part}", f"experts.{name}")


def weight_of(part: str) -> torch.Tensor:
    shape = NUM_EXPERTS * INTERMEDIATE, HIDDEN
    return torch.arange(math.prod(shape)).view(shape) + 0.25 * list(PARAMETERS).index(part)


@pytest.mark.parametrize("resident", [ExpertRange(0, 3), ExpertRange(3, 5)])
def test_its_loader_gets_the_rows_of_resident_experts(
    stock: type[torch.nn.Module], resident: ExpertRange
) -> None:
    whole, ours = stock(), sharded(stock, resident)
    for layer in (whole, ours):
        load(layer, *PARAMETERS)
    ours.raw.check_complete("experts")
    for name in PARAMETERS.values():
        rows = getattr(whole, name)[resident.start : resident.stop]
        assert torch.equal(getattr(ours, name), rows), name
    num_bytes = sum(weight_of(part).nbytes for part in PARAMETERS)
    assert ours.raw.read_bytes == num_bytes // NUM_EXPERTS * len(resident)
    assert ours.raw.checkpoint_bytes == num_bytes


def test_an_update_without_one_of_its_parts_is_refused(stock: type[torch.nn.Module]) -> None:
    """Two of them share a parameter, of which half would be whatever its memory held."""
    before, came = (sharded(stock, ExpertRange(0, 3)) for _ in range(2))
    load(before, *PARAMETERS)
    load(came, "w1", "w2")
    with pytest.raises(WeightUpdateError, match=r"but no w13_weight \(mlp.v1\)"):
        _check_complete("experts", came.raw, before.raw)
    load(came, "v1")
    _check_complete("experts", came.raw, before.raw)

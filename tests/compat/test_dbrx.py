"""DBRX: its own loader of whole tensors of experts, and their number, which vLLM does not find."""

import math

import pytest
import torch

from vllm_dwdp.compat.frontend.expert_count import counted_in_parts
from vllm_dwdp.layout.placement import ExpertRange
from vllm_dwdp.model_executor.raw_parameters import LoadsRawParameters, RawParameters

pytestmark = pytest.mark.compat

NUM_EXPERTS, INTERMEDIATE, HIDDEN = 5, 48, 64


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


@pytest.mark.parametrize("resident", [ExpertRange(0, 3), ExpertRange(3, 5)])
def test_its_loader_gets_the_rows_of_resident_experts(
    resident: ExpertRange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint has `[num_experts * intermediate_size, hidden_size]`, of `w1`, `v1` and `w2`."""
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

    class Ours(LoadsRawParameters, Stock):
        pass

    stock, ours = Stock(), Ours()
    ours.raw = RawParameters(ours, NUM_EXPERTS, resident)
    shape = NUM_EXPERTS * INTERMEDIATE, HIDDEN
    weights = torch.arange(3.0 * math.prod(shape)).view(3, *shape)
    for weight, part, name in zip(
        weights, ("w1", "v1", "w2"), ("w13_weight", "w13_weight", "w2_weight"), strict=True
    ):
        for layer in (stock, ours):
            layer.weight_loader(getattr(layer, name), weight, f"mlp.{part}", f"experts.{name}")
    ours.raw.check_complete("experts")
    rows = slice(resident.start, resident.stop)
    for name in ("w13_weight", "w2_weight"):
        assert torch.equal(getattr(ours, name), getattr(stock, name)[rows]), name
    assert ours.raw.read_bytes == weights.nbytes // NUM_EXPERTS * len(resident)
    assert ours.raw.checkpoint_bytes == weights.nbytes

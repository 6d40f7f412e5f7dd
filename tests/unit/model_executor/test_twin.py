"""The twin of a layer: what stands for experts of other ranks, and what it shares with the layer."""

import pytest
import torch

from vllm_dwdp.compat.worker.moe import give_later_tensors
from vllm_dwdp.errors import DwdpUnsupportedError
from vllm_dwdp.layout.placement import ExpertRange
from vllm_dwdp.model_executor.raw_parameters import bytes_of
from vllm_dwdp.model_executor.twin import check_same, disturbed

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.uint8,
    torch.int8,
    torch.int32,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resident", [(0, 2), (2, 5), (4, 5)])
def test_remote_rows_are_neither_zero_nor_like_ours(
    dtype: torch.dtype, resident: tuple[int, int]
) -> None:
    ours = ExpertRange(*resident)
    codes = torch.arange(1, len(ours) * 12 + 1, dtype=torch.uint8).view(len(ours), 12)
    content = codes.view(dtype) if dtype.itemsize == 1 else codes.to(dtype)
    parameter = torch.nn.Parameter(content, requires_grad=False)
    whole = disturbed(parameter, 5, ours)
    assert whole.shape == (5, 12) and whole.dtype is dtype
    assert torch.equal(bytes_of(whole[ours.start : ours.stop]), bytes_of(content))
    for expert in set(range(5)) - set(range(ours.start, ours.stop)):
        row = bytes_of(whole[expert])
        assert row.count_nonzero() > 0
        assert not any(torch.equal(row, bytes_of(content[mine])) for mine in range(len(ours)))
    if dtype.is_floating_point and dtype is not torch.float8_e8m0fnu:
        numbers = whole.float()
        remote = [row.max() for expert, row in enumerate(numbers) if expert not in ours]
        assert max(remote) > numbers[ours.start : ours.stop].max(), "a maximum would not show"


def test_the_first_difference_is_named() -> None:
    same = {"scale": torch.tensor([1, 2], dtype=torch.uint8), "alpha": 0.5, "nan": float("nan")}
    check_same("layer", same, {**same, "nan": float("nan")})
    for path, other in (("scale", torch.tensor([1, 3], dtype=torch.uint8)), ("alpha", 0.25)):
        with pytest.raises(
            DwdpUnsupportedError, match=f"layer: what processing makes of {path} dep"
        ):
            check_same("layer", same, same | {path: other})
    with pytest.raises(DwdpUnsupportedError, match="of more depends"):
        check_same("layer", same, same | {"more": 1.0})


def test_what_a_model_puts_on_its_layer_is_on_the_twin_too() -> None:
    """As DeepSeek-V4's table of experts by token; what the twin has made itself stays."""
    layer, twin = torch.nn.Module(), torch.nn.Module()
    for each in (layer, twin):
        each.weight = torch.nn.Parameter(torch.zeros(2))
        each.scale = torch.ones(1)
    table = torch.nn.Parameter(torch.arange(3.0))
    object.__setattr__(layer, "table", table)
    layer.settings = {"top_k": 2}
    own = twin.scale
    give_later_tensors(twin, layer)
    assert twin.table is table and not dict(twin.named_parameters()).keys() - {"weight"}
    assert twin.scale is own and not hasattr(twin, "settings")

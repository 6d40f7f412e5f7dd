"""The check of both views at start: one differing byte stops it."""

import pytest
import torch

from vllm_dwdp.errors import TransferError
from vllm_dwdp.model_executor.composites import LayerView
from vllm_dwdp.model_executor.measure import check_views


def view(value: float = float("nan")) -> LayerView:
    weight = torch.full((4, 8), value, dtype=torch.bfloat16)
    return LayerView(composites=(weight.view(-1).view(torch.uint8),), tensors={"w2_weight": weight})


def test_the_same_bytes_pass_whatever_they_mean() -> None:
    check_views(view(), view())


def test_one_differing_byte_is_refused() -> None:
    other = view()
    other.tensors["w2_weight"].view(torch.uint8)[3, 7] ^= 1
    with pytest.raises(TransferError, match="tensor 0 of a layer reads differently through copies"):
        check_views(view(), other)

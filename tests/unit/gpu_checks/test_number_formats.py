"""Weights survive every number format but for its rounding, and are packed as published."""

import pytest
import torch

from gpu_checks import number_formats as numbers
from gpu_checks.quantised_experts import Projection, awq, gptq, packed_int4

ROWS, COLUMNS = 256, 384


@pytest.fixture
def weight() -> torch.Tensor:
    """Random, with one outlier in a group of its own."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    weight[3, 5] = 9.0
    return weight.bfloat16()


def spread(scales: torch.Tensor, size: int) -> torch.Tensor:
    """Scales of groups of columns, for every column."""
    return scales.float().repeat_interleave(size, dim=1)


def unpacked_bytes(packed: torch.Tensor) -> torch.Tensor:
    """Return the four-bit floats in bytes, the lower half first."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()
    return numbers.FP4_MAGNITUDES[codes & 7] * torch.where(codes & 8 > 0, -1.0, 1.0)


def nibbles(packed: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the eight codes of each int32, lowest bits first, along `dim`."""
    shifts = torch.arange(0, 32, 4)
    return ((packed.movedim(dim, -1).unsqueeze(-1) >> shifts) & 15).flatten(-2).movedim(-1, dim)


def error(found: torch.Tensor, weight: torch.Tensor) -> float:
    return float((found - weight.float()).norm() / weight.float().norm())


def test_block_fp8(weight: torch.Tensor) -> None:
    quantised, scales = numbers.fp8_blocks(weight)
    assert quantised.dtype == numbers.FP8 and scales.shape == (2, 3)
    rows = scales.repeat_interleave(numbers.FP8_BLOCK, dim=0)
    assert error(quantised.float() * spread(rows, numbers.FP8_BLOCK), weight) < 0.03


def test_fp8_and_int8_of_whole_tensors_and_of_rows(weight: torch.Tensor) -> None:
    for quantised, scales, shape in (
        (*numbers.fp8_tensor(weight), ()),
        (*numbers.fp8_channels(weight), (ROWS, 1)),
        (*numbers.int8_channels(weight), (ROWS, 1)),
    ):
        assert scales.shape == shape
        assert error(quantised.float() * scales, weight) < 0.03


def test_mxfp4(weight: torch.Tensor) -> None:
    packed, exponents = numbers.mxfp4(weight)
    assert packed.shape == (ROWS, COLUMNS // 2) and exponents.dtype == torch.uint8
    scales = torch.exp2(exponents.float() - 127)
    assert error(unpacked_bytes(packed) * spread(scales, 32), weight) < 0.13


def test_nvfp4(weight: torch.Tensor) -> None:
    packed, scales, second = numbers.nvfp4(weight)
    assert packed.shape == (ROWS, COLUMNS // 2) and scales.dtype == numbers.FP8
    assert error(unpacked_bytes(packed) * spread(scales, 16) * second, weight) < 0.11


def test_the_lowest_bits_are_the_first_neighbour() -> None:
    codes = torch.arange(8)[None]
    assert numbers.pack_integers(codes, 1).tolist() == [[0x76543210]]
    assert numbers.pack_bytes(codes)[0, 0] == 0x10
    assert numbers.pack_integers(codes + 8, 1).tolist() == [[0xFEDCBA98 - 2**32]]
    assert numbers.pack_integers(codes, 1, numbers.AWQ_ORDER).tolist() == [[0x75316420]]


@pytest.mark.parametrize("group", [32, 128])
def test_compressed_int4(weight: torch.Tensor, group: int) -> None:
    one = packed_int4(group)(Projection(weight=weight, expert=0, name="up_proj"))
    assert one["weight_shape"].tolist() == [ROWS, COLUMNS]
    values = nibbles(one["weight_packed"], 1) - 8
    assert error(values * spread(one["weight_scale"], group), weight) < 0.13


def test_gptq_keeps_zero_points_less_one(weight: torch.Tensor) -> None:
    one = gptq(Projection(weight=weight, expert=0, name="up_proj"))
    values = nibbles(one["qweight"], 0).T
    zeros = nibbles(one["qzeros"], 1).T + 1
    scales = spread(one["scales"].T, 128)
    assert error((values - spread(zeros, 128)) * scales, weight) < 0.13
    assert one["g_idx"].tolist() == [column // 128 for column in range(COLUMNS)]


def test_awq_has_its_own_order_and_real_zero_points(weight: torch.Tensor) -> None:
    one = awq(Projection(weight=weight + 0.5, expert=0, name="up_proj"))
    inverse = torch.tensor(numbers.AWQ_ORDER).argsort()
    values, zeros = (
        nibbles(one[name], 1).unflatten(1, (-1, 8))[..., inverse].flatten(1).T
        for name in ("qweight", "qzeros")
    )
    assert zeros.unique().numel() > 3
    scales = spread(one["scales"].T, 128)
    assert error((values - spread(zeros, 128)) * scales, weight + 0.5) < 0.13


def test_every_expert_has_another_input_scale() -> None:
    matrix = torch.ones(1, 1)
    scales = [
        float(Projection(weight=matrix, expert=expert, name=name).input_scale)
        for expert in range(3)
        for name in ("gate_proj", "down_proj")
    ]
    assert len(set(scales)) == len(scales)
    gate, up = (
        Projection(weight=matrix, expert=1, name=name).input_scale
        for name in ("gate_proj", "up_proj")
    )
    assert gate == up

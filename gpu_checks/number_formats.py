"""Numbers in the formats of published checkpoints: what a float weight becomes, and its scales.

Pure arithmetic on one matrix `[rows, columns]` of a linear layer, whose columns are the inputs; a group
is neighbouring columns of one row. What a matrix becomes, multiplied by its scales, is the matrix again
but for rounding: `tests/unit/gpu_checks/test_number_formats.py` shows it.
"""

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
FP8_BLOCK = 128
"""Rows and columns that share a scale in block FP8."""
FP4_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""What three bits of a four-bit float (e2m1) stand for; the fourth is the sign."""
FP4_MAX = 6.0
MXFP4_GROUP = 32
NVFP4_GROUP = 16
EXPONENT_BIAS = 127
"""Of a scale that is a power of two, stored in a byte (e8m0)."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours AWQ stores in an integer's lowest four bits, and then on upwards."""
TINY = 1e-9
"""In the place of a scale of zero."""

Pair = tuple[torch.Tensor, torch.Tensor]


def grouped(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Return `[rows, groups, size]` in float32."""
    return weight.float().unflatten(-1, (-1, size))


def fp8_blocks(weight: torch.Tensor) -> Pair:
    """Return float8 weights, and what to multiply each block by: `[rows / 128, columns / 128]`."""
    rows, columns = weight.shape
    assert rows % FP8_BLOCK == columns % FP8_BLOCK == 0, (rows, columns)
    blocks = weight.float().view(rows // FP8_BLOCK, FP8_BLOCK, columns // FP8_BLOCK, FP8_BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / FP8_MAX
    return (blocks / scales[:, None, :, None]).view(rows, columns).to(FP8), scales


def fp8_tensor(weight: torch.Tensor) -> Pair:
    """Return float8 weights and the one scale of all."""
    scale = weight.float().abs().amax() / FP8_MAX
    return (weight.float() / scale).to(FP8), scale


def fp8_channels(weight: torch.Tensor) -> Pair:
    """Return float8 weights and the scales of rows, `[rows, 1]`."""
    scales = weight.float().abs().amax(dim=1, keepdim=True) / FP8_MAX
    return (weight.float() / scales).to(FP8), scales


def int8_channels(weight: torch.Tensor) -> Pair:
    """Return int8 weights and the scales of rows, `[rows, 1]`."""
    scales = weight.float().abs().amax(dim=1, keepdim=True) / 127
    return (weight.float() / scales).round().to(torch.int8), scales


def int4_symmetric(weight: torch.Tensor, group: int) -> Pair:
    """Return codes 0..15, of which 8 stands for zero, and scales `[rows, groups]`."""
    groups = grouped(weight, group)
    scales = groups.abs().amax(dim=-1).clamp(min=TINY) / 7
    codes = (groups / scales.unsqueeze(-1)).round().clamp(-8, 7) + 8
    return codes.flatten(1).to(torch.int32), scales


def int4_asymmetric(
    weight: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes 0..15, scales, and the codes that stand for zero, the latter `[rows, groups]`."""
    groups = grouped(weight, group)
    low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
    scales = (high - low).clamp(min=TINY) / 15
    zeros = (-low / scales).round().clamp(0, 15)
    codes = ((groups / scales.unsqueeze(-1)).round() + zeros.unsqueeze(-1)).clamp(0, 15)
    return codes.flatten(1).to(torch.int32), scales, zeros.to(torch.int32)


def fp4_codes(values: torch.Tensor) -> torch.Tensor:
    """Return the codes of the nearest four-bit floats; ties go to the smaller magnitude."""
    distances = (values.abs().unsqueeze(-1) - FP4_MAGNITUDES).abs()
    return distances.argmin(dim=-1).to(torch.uint8) | ((values < 0).to(torch.uint8) << 3)


def mxfp4(weight: torch.Tensor) -> Pair:
    """Return packed four-bit floats and a byte for each 32 columns: the exponent of their scale."""
    groups = grouped(weight, MXFP4_GROUP)
    peaks = groups.abs().amax(dim=-1).clamp(min=TINY)
    exponents = torch.ceil(torch.log2(peaks / FP4_MAX))
    codes = fp4_codes(groups / torch.exp2(exponents).unsqueeze(-1))
    return pack_bytes(codes.flatten(-2)), (exponents + EXPONENT_BIAS).to(torch.uint8)


def nvfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return packed four-bit floats, float8 scales of 16 columns each, and the scale of these."""
    groups = grouped(weight, NVFP4_GROUP)
    peaks = groups.abs().amax(dim=-1)
    second = peaks.amax() / (FP4_MAX * FP8_MAX)
    scales = (peaks / FP4_MAX / second).clamp(max=FP8_MAX).to(FP8)
    codes = fp4_codes(groups / (scales.float() * second).clamp(min=TINY).unsqueeze(-1))
    return pack_bytes(codes.flatten(1)), scales, second


def pack_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Pack two codes of the last dimension into a byte, the first into its lower half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def pack_integers(
    codes: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))
) -> torch.Tensor:
    """Pack eight neighbours along `dim` into an int32, `order[0]` into its lowest four bits."""
    eights = codes.to(torch.int64).movedim(dim, -1).unflatten(-1, (-1, 8))
    packed = sum(eights[..., source] << (4 * place) for place, source in enumerate(order))
    assert isinstance(packed, torch.Tensor)
    signed = torch.where(packed >= 2**31, packed - 2**32, packed)
    return signed.to(torch.int32).movedim(-1, dim)

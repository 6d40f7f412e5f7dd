"""What the experts of a bf16 checkpoint are in each published format: names, dtypes, packing.

`number_formats` has the arithmetic; `quantised` the table of formats.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu_checks import number_formats as numbers

Tensors = dict[str, torch.Tensor]

EXPERT = re.compile(r"(?P<layer>.*\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)\.weight$")
FUSED = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
INT4_GROUP = 128


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One projection of one expert, `[outputs, inputs]`."""

    weight: torch.Tensor
    expert: int
    name: str

    @property
    def input_scale(self) -> torch.Tensor:
        """A scale of activations as calibration finds it: one for gate and up."""
        is_down = self.name in ("down_proj", "w2")
        return torch.tensor(0.01 * (1 + self.expert) * (1.7 if is_down else 1.0))


def expert_by_expert(
    quantise: Callable[[Projection], Tensors],
) -> Callable[[Tensors], Tensors]:
    """Replace each projection's `weight` by what `quantise` makes of it, by suffix."""

    def rewrite(tensors: Tensors) -> Tensors:
        written: Tensors = {}
        for name, tensor in tensors.items():
            found = EXPERT.match(name)
            if found is None:
                written[name] = tensor
                continue
            one = Projection(weight=tensor, expert=int(found["expert"]), name=found["projection"])
            for suffix, value in quantise(one).items():
                written[f"{name.removesuffix('weight')}{suffix}"] = value
        return written

    return rewrite


def fuse(tensors: Tensors) -> Tensors:
    """Put all experts of a layer into two tensors, as transformers keeps them in memory."""
    written = {name: tensor for name, tensor in tensors.items() if not EXPERT.match(name)}
    layers: dict[str, dict[int, Tensors]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        if found := EXPERT.match(name):
            layers[found["layer"]][int(found["expert"])][found["projection"]] = tensor
    for layer, experts in layers.items():
        each = [experts[number] for number in sorted(experts)]
        gate_up = [torch.cat([one["gate_proj"], one["up_proj"]]) for one in each]
        written[f"{layer}.gate_up_proj"] = torch.stack(gate_up)
        written[f"{layer}.down_proj"] = torch.stack([one["down_proj"] for one in each])
    return written


def gpt_oss_mxfp4(tensors: Tensors) -> Tensors:
    """Quantise gpt-oss' fused tensors `[experts, inputs, outputs]`; they are published transposed."""
    written: Tensors = {}
    for name, tensor in tensors.items():
        if not FUSED.search(name):
            written[name] = tensor
            continue
        packed, scales = numbers.mxfp4(tensor.transpose(1, 2))
        written[f"{name}_blocks"] = packed.unflatten(-1, (-1, numbers.MXFP4_GROUP // 2))
        written[f"{name}_scales"] = scales
    return written


def fp8_block(one: Projection) -> Tensors:
    """DeepSeek's: a scale for each block of 128 by 128."""
    weight, scales = numbers.fp8_blocks(one.weight)
    return {"weight": weight, "weight_scale_inv": scales}


def fp8_tensor(one: Projection) -> Tensors:
    """One scale for each projection."""
    weight, scale = numbers.fp8_tensor(one.weight)
    return {"weight": weight, "weight_scale": scale}


def fp8_tensor_static(one: Projection) -> Tensors:
    """One scale for each projection, and one for what goes in."""
    return fp8_tensor(one) | {"input_scale": one.input_scale}


def fp8_channel(one: Projection) -> Tensors:
    """Quantise with a scale for each output."""
    weight, scales = numbers.fp8_channels(one.weight)
    return {"weight": weight, "weight_scale": scales}


def int8_channel(one: Projection) -> Tensors:
    """Quantise with a scale for each output."""
    weight, scales = numbers.int8_channels(one.weight)
    return {"weight": weight, "weight_scale": scales}


def packed_int4(group: int) -> Callable[[Projection], Tensors]:
    """Compressed-tensors' packing of four-bit integers, with bf16 scales."""

    def quantise(one: Projection) -> Tensors:
        codes, scales = numbers.int4_symmetric(one.weight, group)
        return {
            "weight_packed": numbers.pack_integers(codes, dim=1),
            "weight_scale": scales.bfloat16(),
            "weight_shape": torch.tensor(one.weight.shape),
        }

    return quantise


def gptq(one: Projection) -> Tensors:
    """GPTQ: inputs first; zero points are stored less one."""
    codes, scales = numbers.int4_symmetric(one.weight, INT4_GROUP)
    outputs, inputs = one.weight.shape
    zeros = torch.full((inputs // INT4_GROUP, outputs), 8 - 1)
    return {
        "qweight": numbers.pack_integers(codes.T, dim=0),
        "qzeros": numbers.pack_integers(zeros, dim=1),
        "scales": scales.T.half(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // INT4_GROUP,
    }


def awq(one: Projection) -> Tensors:
    """AWQ: inputs first; outputs and zero points in AWQ's own order."""
    codes, scales, zeros = numbers.int4_asymmetric(one.weight, INT4_GROUP)
    return {
        "qweight": numbers.pack_integers(codes.T, 1, numbers.AWQ_ORDER),
        "qzeros": numbers.pack_integers(zeros.T, 1, numbers.AWQ_ORDER),
        "scales": scales.T.half(),
    }


def packed_nvfp4(one: Projection) -> Tensors:
    """Compressed-tensors keeps the reciprocals of scales of whole tensors."""
    packed, scales, second = numbers.nvfp4(one.weight)
    return {
        "weight_packed": packed,
        "weight_scale": scales,
        "weight_global_scale": second.reciprocal().view(1),
        "input_global_scale": one.input_scale.reciprocal().view(1),
    }


def modelopt_nvfp4(one: Projection) -> Tensors:
    """ModelOpt keeps scales of whole tensors as they are."""
    packed, scales, second = numbers.nvfp4(one.weight)
    return {
        "weight": packed,
        "weight_scale": scales,
        "weight_scale_2": second,
        "input_scale": one.input_scale,
    }

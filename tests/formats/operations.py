"""What stands for CUDA while vLLM processes weights: a platform that says so, and operations.

An operation works on one expert at a time, whatever the real one does to a row: it permutes, or rounds
with real arithmetic where that is short. So a row of a result depends on that row alone, and every
reduction over experts that is found is vLLM's own.
"""

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

Indices = torch.Tensor
FP8 = torch.float8_e4m3fn


def permuted(rows: int) -> Indices:
    """Return a fixed order of this many rows, which is not the first one."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(rows))


def permuted_rows(matrix: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return matrix[permuted(matrix.shape[0])]


def row_indices(*arguments: Any, **_: Any) -> Indices:
    """FlashInfer's functions take a cache, or none, before the matrix."""
    matrix = next(each for each in arguments if isinstance(each, torch.Tensor))
    return permuted(matrix.shape[0])


def interleaved(scales: torch.Tensor) -> torch.Tensor:
    """Scales of one expert, or of all, with a last dimension turned around."""
    return scales.flip(-1).reshape(-1) if scales.dim() == 2 else scales.flip(-1)


def block_layout(matrix: torch.Tensor, block: int) -> torch.Tensor:
    return matrix.unflatten(-1, (-1, block)).transpose(-3, -2).contiguous()


def mma_view(
    scales: torch.Tensor, m: int, k: int, num_groups: int, sf_vec_size: int = 16
) -> torch.Tensor:
    """Return a view of all experts' scales with the experts last, as CuteDSL has it."""
    tiles = scales.view(num_groups, m // 128, k // sf_vec_size // 4, 32, 4, 4)
    return tiles.permute(3, 4, 1, 5, 2, 0)


def marlin_repack(
    b_q_weight: torch.Tensor,
    perm: torch.Tensor | None = None,
    size_k: int = 0,
    size_n: int = 0,
    num_bits: int = 4,
    is_a_8bit: bool = False,
) -> torch.Tensor:
    """Turn around and reshape to Marlin's tiles of 16 by 16."""
    return b_q_weight.contiguous().flip(0).reshape(size_k // 16, size_n * num_bits // 2)


def marlin_repack_awq(b_q_weight: torch.Tensor, *sizes: Any, **named: Any) -> torch.Tensor:
    return marlin_repack(b_q_weight, None, *sizes, **named)


def marlin_repack_experts(b_q_weight: torch.Tensor, *sizes: Any, **named: Any) -> torch.Tensor:
    return torch.stack([marlin_repack(each, None, *sizes, **named) for each in b_q_weight])


def reordered_int4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CUTLASS' order of four-bit numbers, and a layout for each expert."""
    layouts = torch.arange(9, dtype=torch.int32).expand(weights.shape[0], 9).contiguous()
    return weights.flip(-1).contiguous(), layouts


def scales_to_fp8(_: Any, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round an output's scales to float8, with a float for each output."""
    channels = scales.float().abs().amax(dim=-1, keepdim=True) / torch.finfo(FP8).max
    return (scales.float() / channels.clamp(min=1e-12)).to(FP8), channels


def eight_times(scales: torch.Tensor) -> torch.Tensor:
    """CUTLASS keeps a float8 scale's first eight multiples."""
    multiples = scales.float().unsqueeze(-1) * torch.arange(1, 9) / 8
    return multiples.to(scales.dtype)


def signed_int4(packed: torch.Tensor) -> torch.Tensor:
    """Eight less, in place, for each of the eight numbers in an integer."""
    return packed.bitwise_xor_(-0x77777778)


def scaled_fp8_quant(x: torch.Tensor, scale: torch.Tensor | None = None, **_: Any) -> Any:
    """Round to float8 with a given scale, or the matrix's own."""
    greatest = torch.finfo(FP8).max
    if scale is None:
        scale = x.float().abs().amax() / greatest
    rounded = (x.float() / scale).clamp(-greatest, greatest).to(FP8)
    return rounded, scale


def required_layout(
    sf: torch.Tensor, mn: int, k: int, recipe: tuple[int, int, int], num_groups: int, is_sfa: bool
) -> torch.Tensor:
    """DeepGEMM's scales: four exponents in an integer, rows first in memory, padded to 16 bytes."""
    rows = sf.repeat_interleave(recipe[1], dim=1)[:, :mn]
    exponents = (rows.contiguous().view(torch.int32) >> 23) & 255
    exponents = torch.nn.functional.pad(exponents, (0, -exponents.shape[-1] % 4))
    fours = exponents.unflatten(-1, (-1, 4))
    packed = sum(fours[..., place] << (8 * place) for place in range(4))
    memory = torch.zeros(num_groups, packed.shape[-1], mn + -mn % 4, dtype=torch.int32)
    memory[..., :mn] = packed.transpose(1, 2)
    return memory[..., :mn].transpose(1, 2)


@dataclass
class Wrapped:
    """In the place of triton_kernels' tensor."""

    data: torch.Tensor
    shape: torch.Size


@dataclass
class Precision:
    """In the place of triton_kernels' PrecisionConfig."""

    weight_scale: Wrapped
    flex_ctx: Any = None


def swizzle_mxfp4(weight: torch.Tensor, scale: torch.Tensor, *_: Any) -> tuple[Any, Any, Any]:
    """Hopper's layouts keep the experts outermost: columns first, within each expert."""
    values, scales = (each.transpose(-2, -1).contiguous().flip(-1) for each in (weight, scale))
    return Wrapped(values, values.shape), None, Wrapped(scales, scales.shape)


FLASHINFER: dict[str, dict[str, Any]] = {
    "flashinfer": {
        "block_scale_interleave": interleaved,
        "nvfp4_block_scale_interleave": interleaved,
        "reorder_rows_for_gated_act_gemm": permuted_rows,
        "shuffle_matrix_a": permuted_rows,
        "shuffle_matrix_sf_a": permuted_rows,
    },
    "flashinfer.fused_moe": {"convert_to_block_layout": block_layout},
    "flashinfer.fused_moe.core": {
        "_maybe_get_cached_w3_w1_permute_indices": row_indices,
        "get_w2_permute_indices_with_cache": row_indices,
        "get_reorder_rows_for_gated_act_gemm_row_indices": row_indices,
        "convert_to_block_layout": block_layout,
    },
    "flashinfer.fp4_quantization": {"nvfp4_block_scale_interleave": interleaved},
    "flashinfer.quantization": {},
    "flashinfer.quantization.fp4_quantization": {"block_scale_interleave": interleaved},
    "flashinfer.utils": {"get_shuffle_matrix_a_row_indices": row_indices},
    "flashinfer.cute_dsl": {},
    "flashinfer.cute_dsl.utils": {"convert_sf_to_mma_layout": mma_view},
}

LAYERS = "vllm.model_executor.layers"
UTILS = f"{LAYERS}.quantization.utils"
OPERATIONS: dict[str, Any] = {
    "vllm._custom_ops:gptq_marlin_repack": marlin_repack,
    "vllm._custom_ops:awq_marlin_repack": marlin_repack_awq,
    "vllm._custom_ops:gptq_marlin_moe_repack": marlin_repack_experts,
    "vllm._custom_ops:awq_marlin_moe_repack": marlin_repack_experts,
    "vllm._custom_ops:cutlass_encode_and_reorder_int4b_grouped": reordered_int4,
    "vllm._custom_ops:cutlass_pack_scale_fp8": eight_times,
    "vllm._custom_ops:scaled_fp8_quant": scaled_fp8_quant,
    "vllm.utils.deep_gemm:transform_sf_into_required_layout": required_layout,
    "vllm.utils.deep_gemm:get_mk_alignment_for_contiguous_layout": lambda: [128, 128],
    "vllm.utils.deep_gemm:is_deep_gemm_e8m0_used": lambda: True,
    "vllm.utils.flashinfer:flashinfer_convert_sf_to_mma_layout": mma_view,
    f"{UTILS}.quant_utils:convert_packed_uint4b8_to_signed_int4_inplace": signed_int4,
    f"{UTILS}.quant_utils:convert_bf16_scales_to_fp8": scales_to_fp8,
    f"{UTILS}.mxfp4_utils:_swizzle_mxfp4": swizzle_mxfp4,
}
"""Functions of vLLM, wherever they were imported to."""
TRITON_KERNELS: dict[str, Any] = {
    "PrecisionConfig": Precision,
    "FlexCtx": types.SimpleNamespace,
    "_mx_scale_kwargs": lambda scale: {"weight_scale": scale},
}
"""Names that vLLM's MXFP4 oracle has only where triton_kernels is installed."""
TORCH: dict[str, Any] = {
    "torch.Tensor.cuda": lambda tensor, *_, **__: tensor,
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.current_device": lambda: "cpu",
    "torch.cuda.is_current_stream_capturing": lambda: False,
    "torch.cuda.get_device_properties": lambda *_: types.SimpleNamespace(
        multi_processor_count=132, gcnArchName=""
    ),
    "torch.accelerator.current_device_index": lambda: "cpu",
    "torch.accelerator.empty_cache": lambda: None,
    "torch.accelerator.synchronize": lambda *_: None,
}


@contextlib.contextmanager
def replaced_operations(capability: tuple[int, int]) -> Iterator[None]:
    """While active, vLLM processes weights as on a GPU of this compute capability."""
    oracle = importlib.import_module(f"{LAYERS}.fused_moe.oracle.mxfp4")
    with contextlib.ExitStack() as stack:
        stack.enter_context(flashinfer())
        for name, value in TRITON_KERNELS.items():
            stack.enter_context(mock.patch.object(oracle, name, value, create=True))
        this_gpu = {"torch.cuda.get_device_capability": lambda *_: capability}
        for place, operation in (TORCH | this_gpu).items():
            stack.enter_context(mock.patch(place, operation))
        stack.enter_context(platform(capability))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(replaced_everywhere(OPERATIONS))
        yield


@contextlib.contextmanager
def replaced_everywhere(functions: dict[str, Any]) -> Iterator[None]:
    """Put others in the place of functions of vLLM, "module:name", wherever they were imported to.

    All of vLLM's layers have been imported (`layers.import_everything`).
    """
    stock = {place: getattr(*_owner_and_name(place)) for place in functions}
    try:
        for place, other in functions.items():
            for module, name in holders(place):
                setattr(module, name, other)
        yield
    finally:
        for place, function in stock.items():
            for module, name in holders(place):
                setattr(module, name, function)


def _owner_and_name(place: str) -> tuple[Any, str]:
    module, _, name = place.partition(":")
    return importlib.import_module(module), name


@functools.cache
def holders(place: str) -> list[tuple[Any, str]]:
    """Return the modules of vLLM that have a function under its name, before it is replaced."""
    owner, name = _owner_and_name(place)
    function = getattr(owner, name)
    return [
        (module, name)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("vllm.") and vars(module).get(name) is function
    ]


@contextlib.contextmanager
def flashinfer() -> Iterator[None]:
    """While active, a package that is not installed can be imported."""
    assert "flashinfer" not in sys.modules
    for name, functions in FLASHINFER.items():
        module = types.ModuleType(name)
        vars(module).update(functions, __path__=[])
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in FLASHINFER:
            del sys.modules[name]


@contextlib.contextmanager
def platform(capability: tuple[int, int]) -> Iterator[None]:
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    has = DeviceCapability(*capability)

    def as_pair(wanted: Any) -> tuple[int, int]:
        return (wanted // 10, wanted % 10) if isinstance(wanted, int) else tuple(wanted)

    answers = {
        "is_cuda": lambda *_: True,
        "is_cuda_alike": lambda *_: True,
        "is_cpu": lambda *_: False,
        "is_zen_cpu": lambda *_: False,
        "get_device_capability": lambda *_, **__: has,
        "fp8_dtype": lambda *_: FP8,
        "has_device_capability": lambda wanted, *_, **__: tuple(has) >= as_pair(wanted),
        "is_device_capability": lambda wanted, *_, **__: tuple(has) == as_pair(wanted),
        "is_device_capability_family": lambda wanted, *_, **__: has.major == wanted // 10,
        "support_deep_gemm": lambda *_: True,
        "num_compute_units": lambda *_: 132,
        "supports_fp8": lambda *_: True,
        "is_arch_support_pdl": lambda *_: False,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(current_platform, name, answer))
        yield

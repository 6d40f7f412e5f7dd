"""Configs with which vLLM builds every MoE quantisation method that it has.

The published formats come from `gpu_checks.quantised_configs`; the others are as vLLM's own readers want
them.
"""

from typing import Any

from gpu_checks import quantised_configs as configs

Config = dict[str, Any]

KEPT = ["lm_head"]
CHANNEL = {"strategy": "channel"}
FLOAT8 = {"type": "float"}
MX = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
MX_BYTES = {"scale_dtype": "torch.uint8"}


def _compressed(packing: str, weights: Config, activations: Config | None) -> Config:
    return configs.compressed(packing, weights, activations)(KEPT)


def _quark(weight: Any, activations: Any, packing: str = "reorder") -> Config:
    """AMD Quark's, with one scheme for all layers."""
    everything = {
        "weight": weight,
        "input_tensors": activations,
        "output_tensors": None,
        "bias": None,
    }
    return {
        "quant_method": "quark",
        "export": {"kv_cache_group": [], "pack_method": packing, "weight_format": "real_quantized"},
        "global_quant_config": everything,
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": KEPT,
    }


def _number(dtype: str, granularity: str, **fields: Any) -> Config:
    """Quark's words for numbers."""
    common = {"symmetric": True, "is_dynamic": False, "ch_axis": 0, "group_size": None}
    return {"dtype": dtype, "qscheme": granularity} | common | fields


MX_NUMBER = _number("fp4", "per_group", ch_axis=-1, group_size=32, scale_format="e8m0")
NV_NUMBER = _number("fp4", "per_group", ch_axis=-1, group_size=16, scale_format="fp8_e4m3")


def _auto_round(bits: int) -> Config:
    """Intel AutoRound's, for floats with a power of two for each 32."""
    return {
        "quant_method": "auto-round",
        "bits": bits,
        "group_size": 32,
        "sym": True,
        "data_type": "mx_fp",
        "act_bits": bits,
        "act_data_type": "mx_fp",
        "act_group_size": 32,
        "act_sym": True,
        "packing_format": "auto_round:llm_compressor",
    }


METHODS: dict[str, tuple[str, Config] | None] = {
    "bf16": None,
    "fp8_block": ("fp8", configs.fp8("dynamic", weight_block_size=[128, 128])(KEPT)),
    "fp8_tensor": ("fp8", configs.fp8("dynamic")(KEPT)),
    "fp8_tensor_static": ("fp8", configs.fp8("static")(KEPT)),
    "ct_fp8_tensor_static": (
        "compressed-tensors",
        _compressed(
            "float-quantized",
            FLOAT8 | {"strategy": "tensor"},
            FLOAT8 | {"strategy": "tensor", "dynamic": False},
        ),
    ),
    "ct_fp8_channel": (
        "compressed-tensors",
        _compressed("float-quantized", FLOAT8 | CHANNEL, FLOAT8),
    ),
    "ct_fp8_block": (
        "compressed-tensors",
        _compressed(
            "float-quantized",
            FLOAT8 | {"strategy": "block", "block_structure": [128, 128]},
            FLOAT8 | {"strategy": "group", "group_size": 128},
        ),
    ),
    "modelopt_fp8": ("modelopt", configs.modelopt("FP8")(KEPT)),
    "modelopt_mxfp8": ("modelopt_mxfp8", configs.modelopt("MXFP8")(KEPT)),
    "modelopt_nvfp4": ("modelopt_fp4", configs.modelopt("NVFP4", group_size=16)(KEPT)),
    "ct_nvfp4": (
        "compressed-tensors",
        _compressed(
            "nvfp4-pack-quantized",
            configs.FOUR_BIT_FLOAT,
            configs.FOUR_BIT_FLOAT | {"dynamic": "local"},
        ),
    ),
    "ct_nvfp4_a16": (
        "compressed-tensors",
        _compressed("nvfp4-pack-quantized", configs.FOUR_BIT_FLOAT, None),
    ),
    "ct_int8": ("compressed-tensors", _compressed("int-quantized", CHANNEL, {})),
    "ct_int4": (
        "compressed-tensors",
        _compressed("pack-quantized", configs.int4_group(128), None),
    ),
    "ct_int4_g32": (
        "compressed-tensors",
        _compressed("pack-quantized", configs.int4_group(32), None),
    ),
    "ct_w4a8_fp8": (
        "compressed-tensors",
        _compressed("pack-quantized", configs.int4_group(128), FLOAT8),
    ),
    "ct_w4a8_int8": (
        "compressed-tensors",
        _compressed("pack-quantized", configs.int4_group(32), {}),
    ),
    "ct_mxfp4": (
        "compressed-tensors",
        _compressed("mxfp4-pack-quantized", MX | MX_BYTES, None),
    ),
    "ct_mxfp4_fp8": (
        "compressed-tensors",
        _compressed("mxfp4-pack-quantized", MX | MX_BYTES, FLOAT8),
    ),
    "ct_mxfp8": (
        "compressed-tensors",
        _compressed(
            "mxfp8-quantized",
            MX | MX_BYTES | {"num_bits": 8},
            MX | MX_BYTES | {"num_bits": 8, "dynamic": True},
        ),
    ),
    "gptq": ("gptq", configs.gptq(KEPT)),
    "gptq_int8": ("gptq", configs.gptq(KEPT) | {"bits": 8}),
    "awq": ("awq", configs.awq(KEPT)),
    "moe_wna16": ("moe_wna16", configs.gptq(KEPT)),
    "gpt_oss_mxfp4": ("gpt_oss_mxfp4", {"quant_method": "mxfp4"}),
    "mxfp4": ("mxfp4", {"quant_method": "mxfp4"}),
    "quark_fp8_channel": (
        "quark",
        _quark(
            _number("fp8_e4m3", "per_channel"),
            _number("fp8_e4m3", "per_channel", is_dynamic=True, ch_axis=1),
        ),
    ),
    "quark_fp8_static": (
        "quark",
        _quark(_number("fp8_e4m3", "per_tensor"), _number("fp8_e4m3", "per_tensor")),
    ),
    "quark_int8": (
        "quark",
        _quark(_number("int8", "per_channel"), _number("int8", "per_tensor")),
    ),
    "quark_int4": (
        "quark",
        _quark(_number("int4", "per_group", ch_axis=-1, group_size=128), None),
    ),
    "quark_nvfp4": (
        "quark",
        _quark(
            [NV_NUMBER, _number("fp8_e4m3", "per_tensor")],
            [NV_NUMBER | {"is_dynamic": True}, _number("fp8_e4m3", "per_tensor")],
        ),
    ),
    "inc_mxfp4": ("inc", _auto_round(4)),
    "inc_mxfp8": ("inc", _auto_round(8)),
    "quark_gpt_oss_mxfp4": ("quark", _quark(MX_NUMBER, MX_NUMBER | {"is_dynamic": True})),
}

PROCESSED_LATER = (
    "weights are quantised after loading, which counts loaded elements and waits for all"
)
NOT_BUILT: dict[str, str] = {
    "CompressedTensorsMoEMethod": "a base class",
    "QuarkW4A8Fp8MoEMethod": "for AMD GPUs only",
    "HummingMoEMethod": "the humming package, which compiles kernels on a GPU, converts the weights",
    "ModelOptBlockQuantMoEMethod": "the b12x package converts the weights",
    "QuarkMoEMethod": "a base class",
    "OnlineMoEMethodBase": "a base class",
    "_Fp8OnlineMoEBase": "a base class",
    "Fp8PerTensorOnlineMoEMethod": PROCESSED_LATER,
    "Fp8PerBlockOnlineMoEMethod": PROCESSED_LATER,
    "Fp8PtpcOnlineMoEMethod": PROCESSED_LATER,
    "Int8OnlineMoEMethod": PROCESSED_LATER,
    "Mxfp4OnlineMoEMethod": PROCESSED_LATER,
    "Mxfp8OnlineMoEMethod": PROCESSED_LATER,
    "Nvfp4OnlineMoEMethod": PROCESSED_LATER,
}
NOT_BUILT_SINCE: dict[tuple[int, int], dict[str, str]] = {
    (0, 33): {
        "INCARKWNA16MoEMethod": "the auto_round_kernel package converts the weights",
        "QuarkW8A8Mxfp8MoEMethod": "not tried yet; the kernels are those of ModelOpt's MXFP8",
    }
}
"""Likewise, of newer versions only."""
"""Methods of vLLM for which there is no case, and why."""

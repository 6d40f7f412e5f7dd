"""The `quantization_config` that each published format has in its config.json.

Each is a function of the linear layers that stay bf16: all but the experts.
"""

import re
from collections.abc import Callable
from typing import Any

from gpu_checks.quantised_experts import INT4_GROUP

Config = dict[str, Any]
MakeConfig = Callable[[list[str]], Config]

UNQUANTISED = ["self_attn", ".gate", "lm_head"]
"""Parts of names, for formats that do not take whole ones: of models without other projections."""
NUMBER: Config = {
    "num_bits": 8,
    "type": "int",
    "strategy": "token",
    "dynamic": True,
    "symmetric": True,
    "group_size": None,
    "block_structure": None,
    "observer": None,
    "actorder": None,
}
"""Compressed-tensors' words for numbers: int8, a scale for each token, found when it comes."""
FOUR_BIT_FLOAT = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def fp8(scheme: str, **fields: Any) -> MakeConfig:
    """vLLM's own FP8, also DeepSeek's and Qwen's: `scheme` is of the activations."""
    return lambda kept: {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": scheme,
        "modules_to_not_convert": kept,
        "ignored_layers": kept,
        **fields,
    }


def compressed(packing: str, weights: Config, activations: Config | None) -> MakeConfig:
    """Compressed-tensors: its name of the packing, and how both operands are rounded."""
    group = {
        "targets": ["Linear"],
        "weights": NUMBER | {"dynamic": False} | weights,
        "input_activations": None if activations is None else NUMBER | activations,
        "output_activations": None,
        "format": packing,
    }
    return lambda kept: {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept,
        "kv_cache_scheme": None,
    }


def int4_group(group: int) -> Config:
    """Compressed-tensors' words for four-bit integers."""
    return {"num_bits": 4, "strategy": "group", "group_size": group}


def modelopt(algorithm: str, **fields: Any) -> MakeConfig:
    """NVIDIA ModelOpt's."""
    return lambda kept: {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "kv_cache_quant_algo": None,
        "exclude_modules": kept,
        "ignore": kept,
        **fields,
    }


def gptq(kept: list[str]) -> Config:
    """GPTQ without act-order."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": INT4_GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "dynamic": {rf"-:.*{re.escape(name)}.*": {} for name in UNQUANTISED},
    }


def awq(kept: list[str]) -> Config:
    """AWQ for its GEMM kernels."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": INT4_GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": UNQUANTISED,
    }


def mxfp4(kept: list[str]) -> Config:
    """OpenAI's of gpt-oss."""
    return {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }

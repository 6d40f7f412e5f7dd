"""Bits per weight, as the quantization_config of real checkpoints of each family says."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.planner.test_planner import LLAMA4_MAVERICK, QWEN3_30B
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.model_shape import read_config, shape_of
from vllm_dwdp.planner.paper import DEEPSEEK_R1, GPT_OSS_120B
from vllm_dwdp.planner.quantisation import Quantisation


def shape(config: dict[str, Any], **quantization_config: Any) -> Any:
    return shape_of(config | {"quantization_config": quantization_config})


def test_fp8_in_blocks_converts_all_but_what_it_lists() -> None:
    """As in DeepSeek-V3 and R1: 128 x 128 blocks with one 32-bit scale each."""
    r1 = shape(DEEPSEEK_R1, quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128])
    assert r1.expert_bits == pytest.approx(8 + 32 / 128**2)
    assert r1.attention_bits == r1.dense_mlp_bits == r1.shared_bits == r1.expert_bits
    assert r1.experts_bytes == pytest.approx(654e9, rel=0.01)


def test_mxfp4_of_the_experts_only() -> None:
    """gpt-oss lists its attention with a wildcard."""
    gpt_oss = shape_of(GPT_OSS_120B)
    assert gpt_oss.expert_bits == 4.25
    assert gpt_oss.attention_bits == 16
    assert gpt_oss.experts_bytes + gpt_oss.dense_bytes == pytest.approx(65e9, rel=0.05)
    assert gpt_oss.sliding_share == 0.5
    all_layers_see_all = shape_of(GPT_OSS_120B | {"layer_types": None})
    assert gpt_oss.kv_bytes_per_token(65536) < 0.51 * all_layers_see_all.kv_bytes_per_token(65536)


def test_nvfp4_of_modelopt_and_its_older_file(tmp_path: Path) -> None:
    ignored = [f"model.layers.{layer}.self_attn*" for layer in range(61)] + ["lm_head"]
    new = shape(DEEPSEEK_R1, quant_method="modelopt", quant_algo="NVFP4", ignore=ignored)
    assert (new.expert_bits, new.attention_bits, new.dense_mlp_bits) == (4.5, 16, 4.5)
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    older = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["lm_head", "model.layers.0.mlp*"],
    }
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": older}))
    old = shape_of(read_config(tmp_path))
    assert old.kv_bits == 8
    assert old.attention_bits == 4.5
    assert 4.5 < old.dense_mlp_bits < 16, "one layer of 61 was left out"


def test_compressed_tensors_reads_its_group_and_regexes() -> None:
    """As in Llama-4 and Qwen3 checkpoints of that format."""
    weights = {"num_bits": 4, "group_size": 128, "type": "int"}
    found = shape(
        QWEN3_30B,
        quant_method="compressed-tensors",
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
        kv_cache_scheme={"num_bits": 8, "type": "float"},
    )
    assert found.expert_bits == pytest.approx(4.125)
    assert (found.attention_bits, found.kv_bits) == (16, 8)
    fp8 = shape(
        LLAMA4_MAVERICK,
        quant_method="compressed-tensors",
        config_groups={"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
        ignore=["language_model.model.layers.0.self_attn", "re:.*shared_expert.*"],
    )
    assert fp8.expert_bits == 8
    assert fp8.shared_bits == 16
    assert fp8.attention_bits == pytest.approx(8 + 8 / 48)


def test_names_without_a_dot_mean_every_module_of_that_name() -> None:
    awq = Quantisation({"quant_method": "awq", "bits": 4, "group_size": 64,
                        "modules_to_not_convert": ["self_attn", "shared_expert"]})  # fmt: skip
    assert awq.bits("attention", 4) == 16
    assert awq.bits("shared", 4) == 16
    assert awq.bits("experts", 4) == pytest.approx(4.25)
    nothing = Quantisation({})
    assert nothing.bits("experts", 4) == nothing.kv_bits == 16


def test_an_unknown_method_is_refused_unless_the_user_says_more() -> None:
    with pytest.raises(DwdpConfigError, match="quant_method 'magic'.*--expert-dtype"):
        shape(QWEN3_30B, quant_method="magic")
    with pytest.raises(DwdpConfigError, match="'fp8'; it must be an object"):
        shape_of(QWEN3_30B | {"quantization_config": "fp8"})
    with pytest.raises(DwdpConfigError, match="leaves out 're:"):
        shape(QWEN3_30B, quant_method="fp8", ignore=["re:("])

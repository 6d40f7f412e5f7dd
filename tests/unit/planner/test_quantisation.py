"""Bits per weight, as the quantization_config of real checkpoints of each family says."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.planner.models import LLAMA4_MAVERICK, QWEN3_30B
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.paper import DEEPSEEK_R1, GPT_OSS_120B
from vllm_dwdp.planner.checkpoint import read_config
from vllm_dwdp.planner.model_shape import shape_of
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
    assert gpt_oss.kv_cache.num_full == gpt_oss.num_layers / 2
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
    assert old.kv_cache.kv_bits == 8
    assert old.attention_bits == 4.5
    assert old.dense_mlp_bits == pytest.approx((16 + 2 * 4.5) / 3), "one of three was left out"


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
    assert (found.attention_bits, found.kv_cache.kv_bits) == (16, 8)
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
    assert awq.precision("attention", range(4)).bits == 16
    assert awq.precision("shared", range(4)).bits == 16
    assert awq.precision("experts", range(4)).bits == pytest.approx(4.25)
    nothing = Quantisation({})
    assert nothing.precision("experts", range(4)).bits == nothing.kv_bits == 16


def test_a_kind_is_counted_over_the_layers_that_have_it() -> None:
    """Every module listed by name, as exporters do: only the experts are quantised."""
    kept = []
    for layer in range(48):
        parent = f"language_model.model.layers.{layer}"
        parts = ["shared_expert."] if layer % 2 else [""]
        kept += [f"{parent}.self_attn.{name}_proj" for name in "qkvo"]
        kept += [f"{parent}.feed_forward.{part}gate_proj" for part in parts]
    found = shape(
        LLAMA4_MAVERICK,
        quant_method="compressed-tensors",
        config_groups={"group_0": {"weights": {"num_bits": 8}, "targets": ["Linear"]}},
        ignore=kept,
    )
    assert (found.expert_bits, found.shared_bits, found.dense_mlp_bits) == (8, 16, 16)
    assert found.attention_bits == 16
    dense = [f"model.layers.{layer}.mlp.{n}_proj" for layer in range(3) for n in ("gate", "down")]
    r1 = shape(DEEPSEEK_R1, quant_method="fp8", modules_to_not_convert=dense)
    assert (r1.dense_mlp_bits, r1.expert_bits, r1.attention_bits) == (16, 8, 8)


@pytest.mark.parametrize(
    "targets", [["re:.*mlp\\.experts\\..*"], ["FusedMoE"], ["model.layers.*.mlp.experts"]]
)
def test_targets_say_what_a_group_covers(targets: list[str]) -> None:
    group = {"weights": {"num_bits": 4}, "targets": targets}
    found = shape(DEEPSEEK_R1, quant_method="compressed-tensors", config_groups={"group_0": group})
    assert found.expert_bits == 4
    assert (found.shared_bits, found.dense_mlp_bits, found.attention_bits) == (16, 16, 16)


def test_groups_have_formats_of_their_own() -> None:
    def group(bits: int, target: str) -> dict[str, Any]:
        return {"weights": {"num_bits": bits}, "targets": [target]}

    found = shape(
        DEEPSEEK_R1,
        quant_method="compressed-tensors",
        config_groups={"a": group(4, "re:.*experts.*"), "b": group(8, "Linear")},
    )
    assert (found.expert_bits, found.attention_bits) == (4, 8)


@pytest.mark.parametrize("bits", [0, -4, 4000, "4", True, 3.5])
def test_bits_that_cannot_be(bits: Any) -> None:
    with pytest.raises(DwdpConfigError, match="bits is .*; it must be a whole number from 1 to 32"):
        shape(QWEN3_30B, quant_method="gptq", bits=bits)


def test_the_user_overrides_the_routed_experts_or_the_rest() -> None:
    experts = shape_of(DEEPSEEK_R1, "nvfp4")
    assert (experts.expert_bits, experts.shared_bits, experts.attention_bits) == (4.5, 16, 16)
    rest = shape_of(DEEPSEEK_R1, None, None, "fp8")
    assert (rest.expert_bits, rest.shared_bits, rest.dense_mlp_bits) == (16, 8, 8)


def test_an_unknown_method_is_refused_unless_the_user_says_more() -> None:
    for known in ({}, {"expert_dtype": "fp8"}, {"dense_dtype": "fp8"}):
        with pytest.raises(DwdpConfigError, match="'magic'.*both --expert-dtype and --dense-dtype"):
            shape_of(QWEN3_30B | {"quantization_config": {"quant_method": "magic"}}, **known)
    found = shape_of(
        QWEN3_30B | {"quantization_config": {"quant_method": "magic"}}, "fp8", None, "bf16"
    )
    assert (found.expert_bits, found.attention_bits) == (8, 16)
    with pytest.raises(DwdpConfigError, match="'fp8'; it must be an object"):
        shape_of(QWEN3_30B | {"quantization_config": "fp8"})
    with pytest.raises(DwdpConfigError, match="lists 're:"):
        shape(QWEN3_30B, quant_method="fp8", ignore=["re:("])

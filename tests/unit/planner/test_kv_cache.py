"""What a sequence takes: per token, per sequence, and up to a window, as published configs say it.

`tests/e2e/test_models.py` compares the same with the specification that vLLM makes of each small model.
"""

import json
from typing import Any

import pytest

from tests.unit.planner.models import GLM_4_5, LLAMA4_MAVERICK, QWEN3_30B, run_plan
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.paper import DEEPSEEK_R1, GPT_OSS_120B
from vllm_dwdp.planner.kv_cache import KvCache
from vllm_dwdp.planner.model_shape import shape_of

QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "shared_expert_intermediate_size": 512,
    "vocab_size": 151936,
}
KIMI_LINEAR = {
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 163840,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [each for each in range(1, 27) if each % 4],
        "head_dim": 128,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
}
NEMOTRON_H: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEM*EM-",
    "num_hidden_layers": 7,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 192,
    "n_shared_experts": 1,
    "mlp_hidden_act": "relu2",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 1,
    "conv_kernel": 4,
    "vocab_size": 512,
}


def cache(config: dict[str, Any], **changes: Any) -> KvCache:
    return shape_of(config | changes).kv_cache


def test_qwen3_next_keeps_keys_and_values_in_12_of_48_layers() -> None:
    found = cache(QWEN3_NEXT)
    assert (found.num_full, found.num_states) == (12, 36)
    assert found.token_bytes == 12 * 2 * 2 * 256 * 2 == 24_576
    convolution, recurrent = 3 * (2 * 16 * 128 + 32 * 128), 32 * 128 * 128
    assert found.state_bytes == 36 * 2 * (convolution + recurrent)
    assert cache(QWEN3_NEXT, mamba_ssm_dtype="float32").state_bytes == 36 * (
        2 * convolution + 4 * recurrent
    )


def test_the_bytes_of_a_sequence_are_those_of_its_tokens_and_its_states() -> None:
    shape = shape_of(QWEN3_NEXT)
    found = shape.kv_cache
    assert found.sequence_bytes(0) == found.state_bytes
    assert found.sequence_bytes(1000) == found.state_bytes + 1000 * found.token_bytes
    assert shape.kv_bytes_per_token(1000) == found.sequence_bytes(1000) / 1000
    assert found.keys_seen(4096) == 4096 / 4, "a state has no keys"


def test_the_weights_of_a_layer_with_a_state_are_its_own() -> None:
    shape = shape_of(QWEN3_NEXT)
    full = shape_of(QWEN3_NEXT | {"layer_types": ["full_attention"] * 48}).attention_params
    state = 2048 * (2 * 2048 + 2 * 4096 + 2 * 32) + 4096 * 2048
    assert shape.attention_params == (12 * full + 36 * state) / 48
    total = shape.experts_bytes + shape.dense_bytes
    assert total / 2 == pytest.approx(80e9, rel=0.02), "parameters, as the model's name says"


def test_a_window_is_kept_per_sequence() -> None:
    found = cache(GPT_OSS_120B)
    per_token = 2 * 8 * 64 * 2
    assert found.token_bytes == 18 * per_token
    assert found.window_bytes == 18 * 128 * per_token
    assert (found.window_tokens, found.state_bytes) == (128, 0)
    assert found.sequence_bytes(100) == 36 * 100 * per_token, "shorter than its window"
    assert found.sequence_bytes(1000) == (18 * 1000 + 18 * 128) * per_token


def test_a_chunk_is_kept_per_sequence() -> None:
    found = cache(LLAMA4_MAVERICK, attention_chunk_size=8192)
    assert found.num_full == 12
    assert found.window_bytes == 36 * 8192 * 2 * 8 * 128 * 2


def test_a_latent_is_one_vector() -> None:
    found = cache(DEEPSEEK_R1)
    assert found.token_bytes == 61 * (512 + 64) * 2


def test_layers_that_share_keep_nothing() -> None:
    found = cache(QWEN3_30B, num_kv_shared_layers=8)
    assert found.num_full == QWEN3_30B["num_hidden_layers"] - 8


def test_kimi_counts_its_layers_from_one() -> None:
    found = cache(KIMI_LINEAR)
    assert [number for number, layer in enumerate(found.parts, 1) if layer.elements] == (
        KIMI_LINEAR["linear_attn_config"]["full_attn_layers"]  # type: ignore[index]
    )
    assert found.token_bytes == 7 * (512 + 64) * 2
    assert found.state_bytes == 20 * (2 * 3 * 3 * 4096 + 4 * 32 * 128 * 128), "always float32"


def test_the_letters_of_nemotron_h() -> None:
    shape = shape_of(NEMOTRON_H)
    assert shape.moe_layers == (1, 4)
    assert (shape.kv_cache.num_full, shape.kv_cache.num_states) == (1, 3)
    assert shape.kv_cache.state_bytes == 3 * (2 * 3 * (256 + 64) + 4 * 8 * 32 * 32)
    assert shape.expert_params == 2 * 128 * 96, "two matrices: relu2 has no gate"
    assert shape.dense_mlp_params == round(2 * 128 * 256 / 5), (
        "one feed-forward in five such layers"
    )


def test_ling_has_a_full_layer_at_the_end_of_each_group() -> None:
    found = cache(DEEPSEEK_R1, layer_group_size=8)
    assert (found.num_full, found.num_states) == (61 // 8, 61 - 61 // 8)
    size = DEEPSEEK_R1["hidden_size"] // DEEPSEEK_R1["num_attention_heads"]
    assert found.state_bytes == found.num_states * 2 * DEEPSEEK_R1["num_attention_heads"] * size**2


def test_ling_3_keeps_the_state_of_delta_attention_but_after_the_last_whole_group() -> None:
    ling = {"layer_group_size": 8, "short_conv_kernel_size": 4, "head_dim": 128}
    found = cache(DEEPSEEK_R1, **ling)
    assert (found.num_full, found.num_states) == (7 + 5, 49), "61 layers are 7 groups and 5"
    width = DEEPSEEK_R1["num_attention_heads"] * 128
    assert found.state_bytes == 49 * (2 * 3 * 3 * width + 4 * width * 128)


def test_an_encoder_keeps_nothing() -> None:
    found = cache(GPT_OSS_120B, model_type="openai_privacy_filter")
    assert (found.token_bytes, found.window_bytes, found.state_bytes) == (0, 0, 0)


def test_local_layers_that_are_listed_keep_a_window() -> None:
    found = cache(QWEN3_30B, local_layer_ids=[0, 2], sliding_window_size=512)
    assert (found.num_full, found.window_tokens) == (46, 512)


def test_layers_of_one_kind_have_heads_of_their_own() -> None:
    others = {"attention_type": "sliding_attention", "num_attention_groups": 2, "head_dim": 64}
    found = cache(
        {name: value for name, value in QWEN3_30B.items() if name != "num_key_value_heads"},
        num_attention_groups=8,
        head_dim=128,
        sliding_window=512,
        layer_types=["full_attention", "sliding_attention"] * 24,
        attention_other_setting=others,
    )
    assert found.token_bytes == 24 * 2 * 8 * 128 * 2
    assert found.window_bytes == 24 * 512 * 2 * 2 * 64 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["compressed_sparse_attention"] * 92}, "whose KV cache is unknown here"),
        (
            {"compress_ratios": [0, 4] * 46},
            "what layers keep that compress their KV cache is known here for deepseek_v4",
        ),
        ({"layer_types": ["linear_attention"] * 92}, "no field that says its size is known here"),
        (
            {"layer_types": ["mamba"] * 92, "mamba_d_state": 16, "mamba_ssm_dtype": "int8"},
            "the type of a state in config.json is 'int8'",
        ),
    ],
)
def test_what_is_unknown_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DwdpConfigError, match=message):
        shape_of(GLM_4_5 | changes)


def test_plan_says_what_is_per_token_and_what_per_sequence(tmp_path: Any) -> None:

    def plan(config: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        ended = run_plan("--model", str(tmp_path), "--gpu", "h200")
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    hybrid = plan(QWEN3_NEXT)
    assert "KV cache per token, 12 of 48 layers" in hybrid and " 24.58 " in hybrid
    assert "KV cache per sequence, states of 36 layers" in hybrid
    assert "windows" not in hybrid
    windows = plan(GPT_OSS_120B)
    assert "KV cache per sequence, windows of 128 tokens, at most" in windows
    assert "states" not in windows
    encoder = plan(GPT_OSS_120B | {"model_type": "openai_privacy_filter"})
    assert "KV cache per token, 0 of 36 layers" in encoder
    assert "tokens that fit the KV cache" not in encoder, "any number does"

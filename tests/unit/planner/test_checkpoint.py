"""Which layers have experts, and what the layers without them hide."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.planner.models import (
    LLAMA4_MAVERICK,
    LLAMA4_MAVERICK_FP8,
    QWEN3_30B,
    TRAFFIC,
    break_even,
)
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.paper import DEEPSEEK_R1
from vllm_dwdp.planner.checkpoint import read_config
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.estimates import Part, parts, speedups
from vllm_dwdp.planner.hardware import find_hardware
from vllm_dwdp.planner.model_shape import ModelShape, dense_beside, shape_of
from vllm_dwdp.prefetch.schedule import NUM_SLOTS

TWO_SHARED = {"moe_shared_expert_intermediate_size": 96, "num_shared_experts": 2}


def maverick_on_h200() -> CostModel:
    hardware = find_hardware("h200")
    return CostModel(
        shape=shape_of(LLAMA4_MAVERICK_FP8),
        hardware=hardware,
        efficiency=hardware.efficiency,
        group_size=8,
    )


def ring_seconds(shape: ModelShape, prefetch: float, compute: float, dense: float) -> float:
    """One step of a ring of slots in its steady state, copy by copy (`prefetch.schedule`)."""
    layers, now, copies_done = shape.moe_layers, 0.0, 0.0
    copied = [0.0] * NUM_SLOTS  # when the next layer of each slot is there
    begun = 0.0
    for _ in range(6):
        begun = now
        for order, layer in enumerate(layers):
            before = layers[order - 1] if order else -1
            now = max(now + dense * (layer - before - 1), copied[order % NUM_SLOTS]) + compute
            copies_done = max(now, copies_done) + prefetch
            copied[order % NUM_SLOTS] = copies_done
        now += dense * (shape.num_layers - 1 - layers[-1])
    return now - begun


def pattern(kinds: str) -> ModelShape:
    """Return a shape whose layers are dense (D) or have experts (M)."""
    layers = [layer for layer, kind in enumerate(kinds) if kind == "M"]
    sizes = {"num_hidden_layers": len(kinds), "moe_layers": layers}
    return shape_of(LLAMA4_MAVERICK | sizes)


@pytest.mark.parametrize("kinds", ["M" * 8, "DDD" + "M" * 8, "DM" * 6, "MD" * 6, "DDMM" * 4])
@settings(max_examples=40, deadline=None)
@given(prefetch=st.floats(0.1, 10), compute=st.floats(0.1, 10), dense=st.floats(0, 10))
def test_a_step_takes_what_the_ring_takes(
    kinds: str, prefetch: float, compute: float, dense: float
) -> None:
    shape = pattern(kinds)
    ours = sum(
        count * max(prefetch, compute + beside * dense) for beside, count in shape.dense_beside
    )
    assert ours == pytest.approx(ring_seconds(shape, prefetch, compute, dense), rel=0.03)


def test_dense_layers_help_the_copies_that_have_a_slot() -> None:
    assert dense_beside((3, 4, 5, 6), 7) == ((0.0, 2), (1.5, 2))
    assert dense_beside((1, 3, 5), 6) == ((1.0, 3),)
    assert dense_beside((0, 1), 4) == ((1.0, 2),), "those after the last one help the next step"
    assert dense_beside((0, 1, 2), 3) == ((0.0, 3),)


def test_the_dense_layers_of_maverick_hide_copies_too() -> None:
    model = maverick_on_h200()
    assert break_even(model) == pytest.approx(11_550, rel=0.01)
    long = type(TRAFFIC)(**(vars(TRAFFIC) | {"max_num_batched_tokens": 16384}))
    assert speedups(model, long)["balanced"] == pytest.approx(0.83, abs=0.01)
    step = long.prefill_step
    saved = parts(model, long)
    assert saved[Part.EXPOSED] == 0
    assert model.dwdp_step(step) > model.dense_layers(step).compute, "they are part of the step"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"moe_layer_freq": 1}, list(range(3, 61))),
        ({"moe_layer_freq": 2, "first_k_dense_replace": 0}, list(range(0, 61, 2))),
        ({"moe_layer_freq": [0] * 31 + [1] * 30, "first_k_dense_replace": 0}, list(range(31, 61))),
    ],
)
def test_the_frequency_of_layers_with_experts(change: dict[str, Any], expected: list[int]) -> None:
    assert list(shape_of(DEEPSEEK_R1 | change).moe_layers) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mlp_layer_types": ["dense"] + ["sparse"] * 47}, range(1, 48)),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, range(1, 48, 2)),
        ({"moe_layer_start_index": 2, "moe_layer_end_index": 46}, range(2, 47)),
        ({"decoder_sparse_step": None, "moe_layer_interval": 2}, range(1, 48, 2)),
        ({"num_dense_layers": 2}, range(2, 48)),
        ({"dense_mlp_idx": 2}, range(2, 48)),
        ({"moe_layers_enum": ",".join(map(str, range(3, 48)))}, range(3, 48)),
        ({"mlp_layer_types": ["dense"] + ["sparse"] * 49, "num_nextn_predict_layers": 2}, range(1, 48)),
        ({"layers_block_type": ["attention", "moe"] * 24}, range(1, 48, 2)),
    ],
)  # fmt: skip
def test_how_families_say_which_layers_have_experts(
    change: dict[str, Any], expected: range
) -> None:
    assert shape_of(QWEN3_30B | change).moe_layers == tuple(expected)


@pytest.mark.parametrize(
    "path", [("text_config",), ("llm_config",), ("thinker_config", "text_config")]
)
def test_a_text_model_inside_of_another(path: tuple[str, ...], tmp_path: Path) -> None:
    config: dict[str, Any] = QWEN3_30B
    for name in reversed(path):
        config = {name: config, "model_type": "another", "quantization_config": {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_config(tmp_path)
    assert found == QWEN3_30B | {"quantization_config": {"bits": 4}}


def test_the_words_of_mistral(tmp_path: Path) -> None:
    experts = {"num_experts": 128, "num_experts_per_tok": 4, "expert_hidden_dim": 4096}
    ends = {"num_shared_experts": 1, "first_k_dense_replace": 3}
    params = {
        "dim": 7168,
        "n_layers": 61,
        "n_heads": 128,
        "hidden_dim": 16384,
        "vocab_size": 131072,
    }
    latent = {"q_lora_rank": 1536, "kv_lora_rank": 512, "v_head_dim": 128}
    heads = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    (tmp_path / "params.json").write_text(
        json.dumps(params | latent | heads | {"moe": experts | ends})
    )
    shape = shape_of(read_config(tmp_path))
    assert (shape.num_experts, shape.experts_per_token) == (128, 4)
    assert shape.moe_layers == tuple(range(3, 61))
    assert (shape.experts_bytes + shape.dense_bytes) / 2 == pytest.approx(673e9, rel=0.01)


def test_the_names_of_dbrx() -> None:
    shape = shape_of(
        {
            "model_type": "dbrx",
            "d_model": 6144,
            "n_heads": 48,
            "n_layers": 40,
            "vocab_size": 100352,
            "attn_config": {"kv_n_heads": 8, "model_type": ""},
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        }
    )
    assert (shape.num_experts, shape.experts_per_token, shape.num_moe_layers) == (16, 4, 40)
    assert (shape.experts_bytes + shape.dense_bytes) / 2 == pytest.approx(132e9, rel=0.01)
    assert shape.kv_cache.token_bytes == 40 * 2 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("change", "attribute", "expected"),
    [
        ({"moe_intermediate_size": None, "expert_ffn_hidden_size": 64}, "expert_params", 3 * 2048 * 64),
        ({"moe_intermediate_size": [64, 32]}, "expert_params", 3 * 2048 * 64),
        ({"moe_latent_size": 256}, "expert_params", 3 * 256 * 768),
        ({"routed_expert_hidden_size": 256}, "expert_params", 3 * 256 * 768),
        ({"num_blocks": 6}, "num_banks", 6),
        ({}, "num_banks", 48),
        ({"shared_intermediate_size": 96}, "shared_params", 3 * 2048 * 96),
        ({"share_expert_dim": 96}, "shared_params", 3 * 2048 * 96),
        ({"moe_num_shared_experts": 2}, "shared_params", 3 * 2048 * 2 * 768),
        (TWO_SHARED, "shared_params", 3 * 2048 * 2 * 96),
        (TWO_SHARED | {"model_type": "param2moe"}, "shared_params", 3 * 2048 * 96),
        ({"mlp_hidden_act": "relu2"}, "expert_params", 2 * 2048 * 768),
    ],
)  # fmt: skip
def test_how_families_say_the_sizes_of_feed_forwards(
    change: dict[str, Any], attribute: str, expected: int
) -> None:
    assert getattr(shape_of(QWEN3_30B | change), attribute) == expected


@pytest.mark.parametrize(
    ("config", "share"),
    [
        ({"attention_chunk_size": 8192}, 0.75),
        ({"attention_chunk_size": 8192, "no_rope_layers": []}, 0.75),
        ({"attention_chunk_size": 8192, "no_rope_layers": [1, 0] * 24}, 0.5),
        ({"attention_chunk_size": 8192, "layer_types": ["chunked_attention"] * 48}, 1.0),
        ({"attention_chunk_size": None}, 0.0),
        ({"sliding_window": 4096}, 0.0),
    ],
)
def test_chunked_attention(config: dict[str, Any], share: float) -> None:
    """As Llama-4's published configs say it: by layers without rotary embedding, or not at all."""
    shape = shape_of(LLAMA4_MAVERICK | config)
    narrow = sum(layer.window > 0 for layer in shape.kv_cache.parts)
    assert narrow == share * shape.num_layers
    full = 65536 * (1 - share)
    seen = shape.kv_cache.keys_seen
    assert seen(65536) == pytest.approx(full + share * 4096), "half a chunk in the mean"
    assert seen(100) == 100


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA4_MAVERICK, {"moe_layers": list(range(60))}, "an entry is 48; .* from 0 to 47"),
        (LLAMA4_MAVERICK, {"moe_layers": [1, 1]}, "names a layer twice"),
        (LLAMA4_MAVERICK, {"attention_chunk_size": 9, "no_rope_layers": [1]}, "has 1 entries"),
        (QWEN3_30B, {"mlp_only_layers": ["a"]}, "an entry is 'a'; it must be a whole number"),
        (QWEN3_30B, {"mlp_only_layers": 3}, "mlp_only_layers in config.json is 3; .* a list"),
        (QWEN3_30B, {"decoder_sparse_step": 0}, "decoder_sparse_step in config.json is 0"),
        (DEEPSEEK_R1, {"moe_layer_freq": [1, 2]}, "moe_layer_freq in config.json has 2 entries"),
        (DEEPSEEK_R1, {"moe_layer_freq": 0}, "moe_layer_freq in config.json is 0"),
    ],
)
def test_layers_that_cannot_be(base: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(DwdpConfigError, match=message):
        shape_of(base | change)

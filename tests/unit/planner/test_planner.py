"""The cost model against published figures, and the planner's answers."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.planner.models import (
    ALL,
    GLM_4_5,
    LLAMA4_MAVERICK,
    MIXTRAL_8X7B,
    QWEN3_30B,
    TRAFFIC,
    break_even,
    r1_on_gb200,
    run_plan,
    tokens_of,
)
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.paper import DEEPSEEK_R1, GPT_OSS_120B
from vllm_dwdp.planner.cost import CostModel, Step
from vllm_dwdp.planner.estimates import (
    ALWAYS,
    Decode,
    Part,
    break_even_tokens,
    decode_steps,
    direct_crossover,
    direct_step,
    exposed_seconds,
    kv_tokens,
    memory_bytes,
    parts,
    redundancy,
    replica_fits,
    speedups,
    synchronisation,
)
from vllm_dwdp.planner.hardware import DEFAULT, find_hardware, load_hardware
from vllm_dwdp.planner.model_shape import shape_of
from vllm_dwdp.planner.plan import Figure, make_plan
from vllm_dwdp.planner.traffic import Traffic


@pytest.mark.parametrize(
    ("config", "total_billions", "active_billions"),
    [
        (DEEPSEEK_R1, 671, 37),
        (QWEN3_30B, 30.5, 3.3),
        (GPT_OSS_120B, 117, 5.1),
        (MIXTRAL_8X7B, 46.7, 12.9),
        (LLAMA4_MAVERICK, 400, 17),
        (GLM_4_5, 355, 32),
    ],
)
def test_parameters_add_up_to_the_models_names(
    config: dict[str, Any], total_billions: float, active_billions: float
) -> None:
    """Total and active parameters as their makers state them."""
    shape = shape_of(config)
    dense = (
        shape.num_layers * shape.attention_params
        + shape.num_moe_layers * shape.shared_params
        + (shape.num_layers - shape.num_moe_layers) * shape.dense_mlp_params
        + shape.embedding_params
    )
    total = dense + shape.num_moe_layers * shape.num_experts * shape.expert_params
    active = dense + shape.num_moe_layers * shape.experts_per_token * shape.expert_params
    assert total / 1e9 == pytest.approx(total_billions, rel=0.03)
    # Makers differ in whether embeddings count as active.
    embeddings = config["vocab_size"] * config["hidden_size"]
    assert min(abs(active - n * embeddings - active_billions * 1e9) for n in (0, 1, 2)) < (
        0.06 * active_billions * 1e9
    )


def test_precision_comes_from_the_checkpoint_or_the_user() -> None:
    assert shape_of(DEEPSEEK_R1, "nvfp4").expert_bits == 4.5
    assert shape_of(GPT_OSS_120B).expert_bits == 4.25
    assert shape_of(QWEN3_30B).expert_bits == 16


@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize("gpu", ["h100", "h200", "b200", "gb200", "gb300", "epyc-2core"])
def test_every_family_on_every_machine(config: dict[str, Any], gpu: str) -> None:
    hardware = find_hardware(gpu)
    model = CostModel(
        shape=shape_of(config), hardware=hardware, efficiency=hardware.efficiency, group_size=8
    )
    made = make_plan(model, TRAFFIC)
    topics = {shown.topic for shown in made.figures}
    assert {"memory per rank", "prefill", "prefill, DWDP over DEP"} < topics
    assert all(is_finite(shown) or shown.reason for shown in made.figures)
    fits = memory_bytes(model).kv_cache > 0
    assert fits != any("It does not fit" in sentence for sentence in made.advice)


def is_finite(shown: Figure) -> bool:
    return None not in (shown.low, shown.high) and math.isfinite(shown.low + shown.high)  # type: ignore


def test_where_a_replica_fits_the_planner_says_so() -> None:
    small = r1_on_gb200(shape=shape_of(QWEN3_30B), efficiency=DEFAULT)
    assert replica_fits(small)
    assert any("plain data parallelism" in said for said in make_plan(small, TRAFFIC).advice)
    large = r1_on_gb200(efficiency=DEFAULT)
    assert not replica_fits(large)
    assert not any("plain data" in said for said in make_plan(large, TRAFFIC).advice)


def test_memory_adds_up() -> None:
    model = r1_on_gb200()
    memory = memory_bytes(model)
    assert sum(memory) == pytest.approx(0.9 * 186e9)
    assert memory.experts == pytest.approx(model.shape.experts_bytes / 4)


def test_break_even_is_where_compute_meets_prefetch() -> None:
    model = r1_on_gb200(efficiency=DEFAULT)
    tokens = break_even(model)
    assert 4_000 < tokens < 40_000
    warned = make_plan(model, Traffic(**(vars(TRAFFIC) | {"max_num_batched_tokens": 1024}))).advice
    assert any(f"below the break-even of {tokens}" in said for said in warned)
    redundant = r1_on_gb200(efficiency=DEFAULT, extra_experts=64)
    assert break_even(redundant) < tokens


@pytest.mark.parametrize("config", ALL)
def test_no_part_of_a_step_waits_from_the_break_even_on(config: dict[str, Any]) -> None:
    """By the whole step, dense layers beside the copies included."""
    model = r1_on_gb200(shape=shape_of(config), efficiency=DEFAULT)
    tokens = break_even(model)
    assert exposed_seconds(model, Step.prefill(tokens, 8192)) == 0
    assert exposed_seconds(model, Step.prefill(tokens - 1, 8192)) > 0
    crossover = tokens_of(direct_crossover(model))
    assert direct_step(model, Step.prefill(crossover, 8192)) <= model.dwdp_step(
        Step.prefill(crossover, 8192)
    )


def test_uneven_lengths_cost_dep_and_not_dwdp() -> None:
    assert synchronisation(4, 0.0) == 1.0
    assert 1.0 < synchronisation(4, 0.1) < synchronisation(4, 0.3) < synchronisation(16, 0.3)
    figures = make_plan(r1_on_gb200(efficiency=DEFAULT), TRAFFIC).figures
    (speed,) = [shown for shown in figures if shown.quantity == "throughput, range"]
    assert speed.low is not None
    assert speed.high is not None
    assert speed.low < speed.high
    assert {shown.origin for shown in figures} == {"config", "spec", "default"}


@pytest.mark.parametrize("tokens", [2048, 8192, 32768])
def test_the_parts_add_up_to_the_gain(tokens: int) -> None:
    """Exposed copies included: at 2,048 tokens they are most of a layer."""
    model = r1_on_gb200(efficiency=DEFAULT)
    traffic = Traffic(**(vars(TRAFFIC) | {"max_num_batched_tokens": tokens}))
    dwdp, saved = model.dwdp_step(traffic.prefill_step), parts(model, traffic)
    gains = speedups(model, traffic)
    assert 1 + sum(saved.values()) / dwdp == pytest.approx(gains["with routing skew too"])
    assert gains["balanced"] == pytest.approx(model.dep_step(traffic.prefill_step) / dwdp)
    assert (saved[Part.EXPOSED] < 0) == (tokens < break_even(model))


def test_spare_memory_buys_redundancy() -> None:
    roomy = r1_on_gb200(efficiency=DEFAULT, hardware=find_hardware("gb300"))
    spare, saved, tokens = redundancy(roomy, TRAFFIC)
    assert spare > 11
    assert saved == pytest.approx(spare / 192)
    assert tokens_of(tokens) < break_even(roomy)
    richer = r1_on_gb200(efficiency=DEFAULT, hardware=find_hardware("gb300"), extra_experts=spare)
    assert memory_bytes(richer).kv_cache > 0


def test_decode_heavy_traffic_is_told_to_separate() -> None:
    model = r1_on_gb200(efficiency=DEFAULT)
    heavy = Traffic(**(vars(TRAFFIC) | {"output_tokens": 4096}))
    assert any("separate prefill from decode" in said for said in make_plan(model, heavy).advice)
    assert not any("separate" in said for said in make_plan(model, TRAFFIC).advice)


def test_what_was_calibrated_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    peaks = (
        "bf16_tflops=1\nfp8_tflops=2\nfp4_tflops=0\nmemory_gb=99\nmemory_gbps=900\nlink_gbps=9\n"
    )
    path.write_text(f"[mine]\n{peaks}[mine.efficiency]\nlink = 0.5\nbeside_copies = 0\n")
    mine = find_hardware("mine", path)
    assert mine.efficiency.link == 0.5
    assert mine.efficiency.grouped_gemm == DEFAULT.grouped_gemm
    made = make_plan(r1_on_gb200(hardware=mine, efficiency=mine.efficiency), TRAFFIC)
    origins = {shown.quantity: shown.origin for shown in made.figures}
    assert origins["prefetch per layer"] == "calibrated"
    assert origins["compute per MoE layer, full step"] == "default"
    assert origins["throughput, range"] == "part default"
    path.write_text(f"[mine]\n{peaks}[mine.efficiency]\nspeed = 1\n")
    with pytest.raises(DwdpConfigError, match="efficiency may have attention"):
        find_hardware("mine", path)


def test_this_cpu_is_in_the_table_and_measured() -> None:
    cpu = find_hardware("epyc-2core")
    assert cpu.source.startswith("measured: vllm-dwdp bench --calibrate")
    assert cpu.efficiency.origin() == "calibrated"


@pytest.mark.parametrize(
    ("config", "dtype", "gpu", "ranks", "milliseconds"),
    [(GLM_4_5, "fp8", "h200", 8, 75.7), (MIXTRAL_8X7B, None, "h100", 2, 45.5)],
)
def test_each_decoding_sequence_reads_its_own_keys(
    config: dict[str, Any], dtype: str | None, gpu: str, ranks: int, milliseconds: float
) -> None:
    hardware, shape = find_hardware(gpu), shape_of(config, dtype)
    model = CostModel(
        shape=shape, hardware=hardware, efficiency=hardware.efficiency, group_size=ranks
    )
    traffic = Traffic(**(vars(TRAFFIC) | {"output_tokens": 1024}))
    step = traffic.decode_step
    kv_bytes = 64 * 8704 * shape.kv_bytes_per_token(8704)
    read = kv_bytes / (hardware.memory_gbps * 1e9 * hardware.efficiency.memory)
    steps = decode_steps(model, step)
    assert steps[Decode.DEP] == pytest.approx(milliseconds / 1e3, rel=0.01)
    assert all(seconds > read for seconds in steps.values())
    assert model.step_seconds(Step.prefill(64, 17408)).attention < read / 10, "of one prompt: once"


def test_prompts_of_several_steps_see_their_earlier_chunks() -> None:
    model = r1_on_gb200(efficiency=DEFAULT)
    assert Step.prefill(8192, 131072).mean_keys == 65536
    assert break_even(model, 131072) < break_even(model, 32768) < break_even(model, 8192)


def test_one_layer_in_16_bits_does_not_slow_the_others() -> None:
    def experts_seconds(num_kept: int) -> float:
        kept = [f"model.layers.{60 - layer}.mlp.experts*" for layer in range(num_kept)]
        quantised = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": kept}
        model = r1_on_gb200(shape=shape_of(DEEPSEEK_R1 | {"quantization_config": quantised}))
        return model.layer(TRAFFIC.prefill_step, 256).experts

    none, two, three = (experts_seconds(count) for count in (0, 2, 3))
    assert two / none == pytest.approx(1 + 3 * 2 / 58)
    assert three / none == pytest.approx(1 + 3 * 3 / 58)


def test_weight_only_formats_compute_in_16_bits_and_dispatch_follows() -> None:
    def on(gpu: str, dtype: str) -> CostModel:
        return r1_on_gb200(hardware=find_hardware(gpu), shape=shape_of(DEEPSEEK_R1, dtype))

    step = TRAFFIC.prefill_step
    in_bf16 = on("h200", "bf16").layer(step, 256).experts
    for dtype in ("mxfp4", "nvfp4", "int4"):
        model = on("h200", dtype)
        assert model.layer(step, 256).experts == pytest.approx(in_bf16)
        assert model.dispatch_bits == 16
        assert any("are dequantised" in said for said in make_plan(model, TRAFFIC).assumptions)
    assert on("h200", "fp8").layer(step, 256).experts < 0.6 * in_bf16
    assert on("h200", "fp8").dispatch_bits == 8
    assert on("gb200", "nvfp4").dispatch_bits == 4.5
    assert on("gb200", "int4").dispatch_bits == 16


def on_cpu(**changes: Any) -> CostModel:
    cpu = find_hardware("epyc-2core")
    return r1_on_gb200(hardware=cpu, efficiency=cpu.efficiency, **changes)


def test_where_direct_always_wins_there_is_no_break_even_and_no_advice_against_it() -> None:
    heavy = Traffic(**(vars(TRAFFIC) | {"output_tokens": 8192, "max_num_batched_tokens": 1024}))
    made = make_plan(on_cpu(), heavy)
    figures = {shown.quantity: shown for shown in made.figures}
    needed = figures["break-even tokens per step and rank"]
    assert (needed.low, needed.high) == (None, None)
    assert needed.reason == "does not apply: reading in place always wins"
    assert figures["read in place (direct) up to"].reason == "any step"
    assert not any("separate prefill" in said for said in made.advice)
    saved = parts(on_cpu(), heavy)
    assert Part.INTERFERENCE not in saved
    assert Part.IN_PLACE in saved


def test_no_break_even_is_a_reason_and_not_a_number() -> None:
    def instead(**efficiencies: float) -> str:
        model = r1_on_gb200(efficiency=replace(DEFAULT, **efficiencies))
        found = break_even_tokens(model, 8192)
        assert found.number is None
        return found.instead

    assert instead(beside_copies=0) == "does not apply: compute stops beside copies"
    assert instead(link=1e-6, direct=1e-7) == "never: not up to 1,048,576 tokens"
    resident = r1_on_gb200(extra_experts=192)
    assert "every expert is resident" in break_even_tokens(resident, 8192).instead
    assert make_plan(resident, TRAFFIC).figures


def test_what_rests_on_an_assumption_is_not_calibrated() -> None:
    made = make_plan(on_cpu(), TRAFFIC)
    origins = {shown.quantity: shown.origin for shown in made.figures}
    for quantity in ("all-to-all saved", "throughput, balanced", "step, DEP balanced"):
        assert origins[quantity] == "part default"
    assert origins["synchronisation saved, routing skew 1.1"] == "part default"
    assert origins["prefetch per layer"] == "calibrated"
    assert any("16 bits per hidden element" in said for said in made.assumptions)


def test_a_batch_beyond_the_kv_cache_is_said_to_be() -> None:
    model = r1_on_gb200(efficiency=DEFAULT)
    most = int(kv_tokens(model, 8192) // 8192)
    for batch_size, is_short in ((most - 1, False), (2 * most, True)):
        traffic = Traffic(**(vars(TRAFFIC) | {"batch_size": batch_size}))
        advice = make_plan(model, traffic).advice
        assert any("need a KV cache of" in said for said in advice) == is_short


def test_small_steps_read_in_place() -> None:
    assert 20 < tokens_of(direct_crossover(r1_on_gb200(efficiency=DEFAULT))) < 500
    cpu = find_hardware("epyc-2core")
    host = r1_on_gb200(hardware=cpu, efficiency=cpu.efficiency)
    assert direct_crossover(host) == ALWAYS, "on a host, peers' memory is memory"
    steps = {shown.quantity: shown.low for shown in make_plan(host, TRAFFIC).figures}
    assert steps["step, DWDP direct"] == pytest.approx(steps["step, full replica"], rel=0.1)


def test_your_own_accelerator(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "[mine]\nbf16_tflops=1\nfp8_tflops=1\nfp4_tflops=0\nmemory_gb=8\nmemory_gbps=9\nlink_gbps=7\n"
    )
    assert find_hardware("MINE", path).link_gbps == 7
    assert len(load_hardware()) >= 5
    path.write_text("[mine]\nbf16_tflops=1\n")
    with pytest.raises(DwdpConfigError, match="'mine' must have exactly"):
        load_hardware(path)
    path.write_text(path.read_text().replace("1", "-1") + "nonsense")
    with pytest.raises(DwdpConfigError, match="--hardware"):
        load_hardware(path)


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    common = ("--model", str(tmp_path), "--gpu", "gb200", "--expert-dtype", "nvfp4")
    answer = json.loads(run_plan(*common, "--json").stdout)
    assert {"topic", "quantity", "low", "high", "unit", "origin", "reason"} == set(
        answer["lines"][0]
    )
    shown = run_plan(*common).stdout
    assert "break-even tokens" in shown
    assert "default" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--gpu": "tpu"}, "--gpu 'tpu' is unknown; known are b200"),
        ({"--model": "/nowhere"}, "--model /nowhere"),
        ({"--expert-dtype": "int3"}, "--expert-dtype 'int3' is unknown"),
        (
            {"--variation": "-1"},
            "--variation is -1.0; it must be a number of at least 0 and at most 1.",
        ),
        ({"--kv-dtype": "fp3"}, "--kv-dtype 'fp3' is unknown"),
        ({"--ranks": "1"}, "--ranks is 1; it must be a whole number of at least 2."),
        (
            {"--experts-per-rank": "500"},
            "--experts-per-rank is 500; it must be a whole number from 64 to 256.",
        ),
        (
            {"--max-num-batched-tokens": "0"},
            "--max-num-batched-tokens is 0; it must be a whole",
        ),
        ({"--batch-size": "-3"}, "--batch-size is -3; it must be a whole number of at least 1."),
        ({"--hardware": "/nowhere.toml"}, "--hardware /nowhere.toml"),
        ({"--png": "/nowhere/plan.png"}, "--png /nowhere/plan.png cannot be written"),
        ({"--png": "/proc"}, "--png /proc cannot be written"),
        ({"--input-tokens": "0"}, "--input-tokens is 0; it must be a whole number of at least 1."),
        (
            {"--output-tokens": "-5"},
            "--output-tokens is -5; it must be a whole number of at least 0.",
        ),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    options = {"--model": str(tmp_path), "--gpu": "gb200"} | changes
    ended = run_plan(*(part for pair in options.items() for part in pair))
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"vllm-dwdp: {message}")
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size in config.json is 0; it must be a whole number of at"),
        ({"num_experts_per_tok": 300}, "routes a token to 300 of 256 experts"),
        ({"first_k_dense_replace": 61}, "leaves no layer with experts"),
        ({"vocab_size": None}, "config.json has no vocab_size"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DwdpConfigError, match=message):
        shape_of(DEEPSEEK_R1 | change)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "model_type": "llama"}))
    ended = run_plan("--model", str(tmp_path), "--gpu", "h100")
    assert ended.returncode == 2
    assert "has no routed experts" in ended.stderr

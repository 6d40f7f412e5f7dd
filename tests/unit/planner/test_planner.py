"""The cost model against published figures, and the planner's answers."""

import math
from dataclasses import replace
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
    tokens_of,
)
from vllm_dwdp.paper import DEEPSEEK_R1, GPT_OSS_120B
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.estimates import (
    ALWAYS,
    Part,
    break_even_tokens,
    direct_crossover,
    direct_step,
    exposed_seconds,
    parts,
    redundancy,
    speedups,
    synchronisation,
)
from vllm_dwdp.planner.hardware import DEFAULT, find_hardware
from vllm_dwdp.planner.memory import kv_tokens, memory_bytes, replica_fits
from vllm_dwdp.planner.model_shape import shape_of
from vllm_dwdp.planner.plan import Figure, make_plan
from vllm_dwdp.planner.step import Step
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

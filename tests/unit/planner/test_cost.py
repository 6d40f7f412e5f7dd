"""The seconds of one step."""

from typing import Any

import pytest

from tests.unit.planner.models import (
    GLM_4_5,
    MIXTRAL_8X7B,
    TRAFFIC,
    break_even,
    r1_on_gb200,
)
from vllm_dwdp.paper import DEEPSEEK_R1
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.estimates import Decode, decode_steps
from vllm_dwdp.planner.hardware import DEFAULT, find_hardware
from vllm_dwdp.planner.model_shape import shape_of
from vllm_dwdp.planner.plan import make_plan
from vllm_dwdp.planner.step import Step
from vllm_dwdp.planner.traffic import Traffic


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

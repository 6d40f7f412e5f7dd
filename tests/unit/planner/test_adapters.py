"""Memory for LoRA adapters; `tests/e2e/test_lora.py` compares it with what vLLM allocates."""

from dataclasses import replace

import pytest

from tests.unit.planner.models import QWEN3_30B, TRAFFIC
from vllm_dwdp.planner.adapters import Slots
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.hardware import find_hardware
from vllm_dwdp.planner.memory import expert_parallel_kv_bytes, memory_bytes, replica_kv_bytes
from vllm_dwdp.planner.model_shape import shape_of
from vllm_dwdp.planner.plan import make_plan

SLOTS = Slots(number=4, rank=16)


def model(num_gpus: int = 1) -> CostModel:
    hardware = find_hardware("h200", None).times(num_gpus)
    return CostModel(
        shape=shape_of(QWEN3_30B), hardware=hardware, efficiency=hardware.efficiency, group_size=4
    )


def test_slots_take_what_docs_say_of_experts_and_little_more() -> None:
    of_experts = 48 * 128 * 16 * 3 * (2048 + 768) * 2
    taken = replace(model(), adapters=SLOTS).adapter_bytes
    assert 4 * of_experts < taken < 1.03 * 4 * of_experts


def test_the_kv_cache_has_the_less_on_every_way_to_serve() -> None:
    plain, adapted = model(), replace(model(), adapters=SLOTS)
    for room in (lambda m: memory_bytes(m).kv_cache, replica_kv_bytes, expert_parallel_kv_bytes):
        assert room(plain) - room(adapted) == pytest.approx(adapted.adapter_bytes)
    (figure,) = [f for f in make_plan(adapted, TRAFFIC).figures if "LoRA" in f.quantity]
    assert figure.low == adapted.adapter_bytes / 1e9
    assert not [f for f in make_plan(plain, TRAFFIC).figures if "LoRA" in f.quantity]


def test_of_several_gpus_each_has_one_half_whole() -> None:
    one, two = (replace(model(n), adapters=SLOTS).adapter_bytes for n in (1, 2))
    size = shape_of(QWEN3_30B).adapters
    assert two - one == SLOTS.number * SLOTS.rank * 2 * size.whole

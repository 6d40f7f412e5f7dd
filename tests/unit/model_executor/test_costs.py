"""What a rank makes of what it measured: the planner's break-even, a limit, and one line in the log."""

from dataclasses import replace
from typing import Any

import pytest

from tests.unit.planner.models import ALL, tokens_of
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.device.host import HostDevice
from vllm_dwdp.model_executor import costs
from vllm_dwdp.model_executor.costs import (
    LARGE_PRODUCT,
    ServedModel,
    choose_policy,
    costs_from,
    log_break_even,
    proposed_limit,
)
from vllm_dwdp.model_executor.measure import Speeds
from vllm_dwdp.paper import DEEPSEEK_R1
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.estimates import break_even_tokens, direct_crossover
from vllm_dwdp.planner.hardware import DEFAULT, Hardware, find_hardware
from vllm_dwdp.planner.model_shape import shape_of
from vllm_dwdp.prefetch.mode_policy import LayerCosts, Mode, ModePolicy

NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
R1_NVFP4 = DEEPSEEK_R1 | {"quantization_config": NVFP4}


def speeds_of(hardware: Hardware) -> Speeds:
    """Return what a rank would measure on a machine that reaches what the planner expects of it."""
    return Speeds(
        copy_bytes_per_s=hardware.link_gbps * 1e9 * DEFAULT.link,
        direct_bytes_per_s=hardware.link_gbps * 1e9 * DEFAULT.direct,
        memory_bytes_per_s=hardware.memory_gbps * 1e9 * DEFAULT.memory,
        operations_per_s=hardware.bf16_tflops * 1e12 * LARGE_PRODUCT,
        has_fp8=True,
        has_fp4=hardware.fp4_tflops > 0,
    )


def served(config: dict[str, Any], max_num_batched_tokens: int = 8192) -> ServedModel:
    return ServedModel(
        config=config, max_num_batched_tokens=max_num_batched_tokens, max_model_len=163_840
    )


def measured(
    config: dict[str, Any], gpu: str = "gb200", ranks: int = 4, num_workers: int = 1
) -> LayerCosts:
    shape = shape_of(config)
    resident = -(-shape.num_experts // ranks)
    return costs_from(
        speeds_of(find_hardware(gpu)),
        replace(served(config), tensor_parallel_size=num_workers),
        group_size=ranks,
        num_experts=shape.num_experts,
        num_resident=resident,
        experts_per_token=shape.experts_per_token,
        remote_bytes=int((shape.num_experts - resident) * shape.expert_bytes) // num_workers,
    )


@pytest.mark.parametrize("gpu", ["h100", "h200", "b200", "gb200"])
@pytest.mark.parametrize("config", [R1_NVFP4, *ALL])
def test_a_start_and_the_planner_say_the_same_of_the_same_machine(
    config: dict[str, Any], gpu: str
) -> None:
    hardware = find_hardware(gpu)
    model = CostModel(shape=shape_of(config), hardware=hardware, efficiency=DEFAULT, group_size=4)
    found = measured(config, gpu)
    planned = tokens_of(break_even_tokens(model, 8192))
    assert found.break_even_tokens == pytest.approx(planned, rel=0.002), "bytes are whole numbers"
    assert found.direct_max_tokens == pytest.approx(tokens_of(direct_crossover(model)), abs=1)


def test_workers_of_a_rank_share_its_compute() -> None:
    """Each copies its slice over its own links, beside half of the compute: the break-even stays."""
    alone = measured(R1_NVFP4)
    slice_ = measured(R1_NVFP4, num_workers=2)
    assert slice_.remote_bytes == alone.remote_bytes // 2
    assert slice_.compute_seconds(4096) == pytest.approx(alone.compute_seconds(4096) / 2)
    assert slice_.break_even_tokens == alone.break_even_tokens


def test_the_published_chunks_lie_on_either_side_of_the_break_even() -> None:
    """R1 in NVFP4 on GB200: chunks of 4K tokens lose (0.385x), chunks of 32K win (1.209x)."""
    needed = measured(R1_NVFP4).break_even_tokens
    assert needed is not None and 4096 < needed < 32_768


def test_of_an_unknown_model_only_the_reading_of_experts_counts() -> None:
    found = replace_config(R1_NVFP4, {"architectures": ["Other"], "num_layers": 3})
    assert found.break_even_tokens is None
    assert found.compute_seconds(10**6) == pytest.approx(256 * found.remote_bytes / 192 / 6.4e12)
    assert 0 < found.direct_max_tokens < 128


def replace_config(config: dict[str, Any], other: dict[str, Any]) -> LayerCosts:
    """Return the costs of `config`'s layers, where the planner is shown `other`."""
    shape = shape_of(config)
    return costs_from(
        speeds_of(find_hardware("gb200")),
        served(other),
        group_size=4,
        num_experts=256,
        num_resident=64,
        experts_per_token=8,
        remote_bytes=int(192 * shape.expert_bytes),
    )


def test_who_proposes_what() -> None:
    found = measured(R1_NVFP4)
    auto = DwdpConfig(group_size=4)
    assert proposed_limit(auto, found) == found.direct_max_tokens
    assert proposed_limit(replace(auto, direct_max_tokens=7), found) == 7
    assert proposed_limit(replace(auto, mode="prefetch"), found) is None
    assert proposed_limit(auto, None) is None


def test_the_policy_is_the_users_or_the_groups() -> None:
    found, device, auto = measured(R1_NVFP4), HostDevice(), DwdpConfig(group_size=4)
    needed = found.break_even_tokens
    agreed = choose_policy(auto, device, found, 5)
    assert agreed.limit == 5 and "group" in agreed.reason and agreed.break_even_tokens == needed
    set_by_user = choose_policy(replace(auto, direct_max_tokens=7), device, found, 5)
    assert set_by_user.limit == 7
    prefetch = choose_policy(replace(auto, mode="prefetch"), device, found, None)
    assert prefetch == ModePolicy.forced(Mode.PREFETCH, needed)
    assert choose_policy(auto, device, None, None).reason.startswith("on the host")


@pytest.mark.parametrize(("max_num_batched_tokens", "warns"), [(4096, True), (32_768, False)])
def test_one_line_says_the_break_even_and_a_warning_names_the_flag(
    monkeypatch: pytest.MonkeyPatch, max_num_batched_tokens: int, warns: bool
) -> None:
    said: dict[str, list[str]] = {"info": [], "warning": []}
    for level, lines in said.items():
        write = lambda text, *words, lines=lines: lines.append(text % words)  # noqa: E731
        monkeypatch.setattr(costs.logger, level, write)
    policy = ModePolicy.by_tokens(64, 8300)
    log_break_even(2, policy, served({}, max_num_batched_tokens))
    (line,) = said["info"]
    assert line.startswith("DWDP rank 2: copies are hidden in steps of about 8300 tokens and more")
    assert "up to 64 tokens" in line
    assert len(said["warning"]) == warns
    if warns:
        assert "max_num_batched_tokens=4096 is below" in said["warning"][0]
        assert "--max-num-batched-tokens 8300" in said["warning"][0]


def test_nothing_is_said_where_there_is_no_break_even(monkeypatch: pytest.MonkeyPatch) -> None:
    def say(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(costs.logger, "info", say)
    log_break_even(0, ModePolicy.direct_only(shares_compute=True), served({}))


def test_what_is_measured_are_peaks_of_the_planner() -> None:
    hardware = costs.hardware_of(speeds_of(find_hardware("gb200")))
    table = find_hardware("gb200")
    assert hardware.bf16_tflops == pytest.approx(table.bf16_tflops)
    assert hardware.fp8_tflops == pytest.approx(table.fp8_tflops)
    assert hardware.fp4_tflops == pytest.approx(table.fp4_tflops)
    assert hardware.memory_gbps == pytest.approx(table.memory_gbps)

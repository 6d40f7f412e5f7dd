"""Accelerators: those of the table, and the user's own."""

from pathlib import Path

import pytest

from tests.unit.planner.models import (
    TRAFFIC,
    r1_on_gb200,
)
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.hardware import DEFAULT, find_hardware, load_hardware
from vllm_dwdp.planner.plan import make_plan


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

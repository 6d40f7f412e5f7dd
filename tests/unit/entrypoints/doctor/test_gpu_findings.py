"""What `doctor` makes of GPUs and fabrics that are not here, and which of them each rank gets."""

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.entrypoints.doctor.findings import topology, verdicts
from vllm_dwdp.entrypoints.doctor.gpu_findings import judge_gpus, judge_silent_driver
from vllm_dwdp.entrypoints.doctor.gpus import Gpu, find_topology, one_gpu_each
from vllm_dwdp.errors import DwdpConfigError


def test_a_good_machine_has_nothing_to_complain_of() -> None:
    findings = judge_gpus(topology(), 4)
    assert verdicts(findings) == {}
    assert [finding.seen for finding in findings] == [
        "4 (GB200)",
        "CUDA 12.8",
        "all 6 pairs read each other",
        "between all 6 pairs that read each other",
        "completed, 1 clique(s), channel0",
    ]


@pytest.mark.parametrize(
    ("changes", "check", "verdict", "seen"),
    [
        ({"cuda_version": 12040}, "CUDA driver", "warning", "CUDA 12.4"),
        ({"readable": frozenset({(0, 1)})}, "peer access", "problem", "0 and 2, 0 and 3, 1 and 2"),
        ({"linked": frozenset({(0, 1)})}, "NVLink", "warning", "only PCIe between 0 and 2"),
        ({"imex_channels": ()}, "NVLink fabric", "warning", "no IMEX channel"),
        (
            {"gpus": (Gpu(name="GB200", fabric="in progress", clique="c/1"),) * 4},
            "NVLink fabric",
            "problem",
            "in progress",
        ),
        ({"gpus": ()}, "GPU", "warning", "0 (none)"),
    ],
)
def test_what_is_wrong_with_gpus(
    changes: dict[str, Any], check: str, verdict: str, seen: str
) -> None:
    findings = {finding.check: finding for finding in judge_gpus(topology(**changes), 4)}
    assert (findings[check].verdict, bool(findings[check].advice)) == (verdict, True)
    assert seen in findings[check].seen


def test_more_ranks_than_gpus() -> None:
    assert verdicts(judge_gpus(topology(), 8)) == {"GPU": "warning"}


def test_a_driver_without_a_device_does_not_stop_the_cpu_build() -> None:
    assert judge_silent_driver("not loaded", on_cpu=True).verdict == "warning"
    assert judge_silent_driver("not loaded", on_cpu=False).verdict == "problem"


class FabricInfo(ctypes.Structure):
    """The fields of nvidia-ml-py's `c_nvmlGpuFabricInfo_t`."""

    _fields_ = (
        ("clusterUuid", ctypes.c_uint8 * 16),
        ("status", ctypes.c_uint),
        ("cliqueId", ctypes.c_uint32),
        ("state", ctypes.c_uint8),
    )


def fake_nvml(fabric: int | None) -> Any:
    """Two GPUs that read each other over PCIe; a stand-in, since no driver is here."""

    class NVMLError(Exception):
        pass

    def fabric_info(handle: str, reference: Any) -> None:
        if fabric is None:
            raise NVMLError("not supported")
        info = reference._obj
        info.state, info.cliqueId = fabric, 7

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: f"handle {index}",
        nvmlDeviceGetP2PStatus=lambda a, b, kind: 0 if kind == 0 else 1,
        nvmlSystemGetCudaDriverVersion=lambda: 12090,
        nvmlDeviceGetName=lambda handle: b"H100",
        nvmlDeviceGetGpuFabricInfo=fabric_info,
        c_nvmlGpuFabricInfo_t=FabricInfo,
    )


@pytest.mark.parametrize(
    ("fabric", "state"), [(None, "none"), (0, "none"), (3, "completed"), (9, "9")]
)
def test_reading_the_topology(fabric: int | None, state: str, tmp_path: Path) -> None:
    (tmp_path / "channel3").touch()
    seen = find_topology(fake_nvml(fabric), tmp_path)
    assert [(gpu.name, gpu.fabric) for gpu in seen.gpus] == [("H100", state)] * 2
    assert (seen.readable, seen.linked) == (frozenset({(0, 1)}), frozenset())
    assert seen.imex_channels == ("channel3",)


def test_launch_gives_each_rank_one_gpu() -> None:
    assert one_gpu_each(2, {}, 0) == [{}, {}], "ranks on the CPU"
    assert one_gpu_each(2, {}, 4) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    chosen = {"CUDA_VISIBLE_DEVICES": "3,GPU-8f2c"}
    assert one_gpu_each(2, chosen, 4)[1] == {"CUDA_VISIBLE_DEVICES": "GPU-8f2c"}
    with pytest.raises(DwdpConfigError, match=r"--ranks 3: CUDA_VISIBLE_DEVICES=3,GPU-8f2c has 2"):
        one_gpu_each(3, chosen, 4)
    with pytest.raises(DwdpConfigError, match=r"--ranks 9: this machine has 4 GPUs"):
        one_gpu_each(9, {}, 4)


@pytest.mark.feature("Tensor parallelism inside a rank")
def test_a_rank_of_several_workers_gets_gpus_in_a_row() -> None:
    """Workers of one tensor rank are equally far apart, as `judge_gpus` assumes."""
    given = one_gpu_each(2, {}, 8, [1], gpus_of_a_rank=3)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in given] == ["0,1,2", "3,4,5", "6"]
    with pytest.raises(DwdpConfigError, match=r"has 4 GPUs, and every rank needs 3 of its own"):
        one_gpu_each(2, {}, 4, gpus_of_a_rank=3)


@pytest.mark.feature("Tensor parallelism inside a rank")
def test_only_gpus_of_one_tensor_rank_must_read_each_other() -> None:
    """Two ranks on GPUs 0, 1 and 2, 3: experts travel between 0 and 2, and between 1 and 3."""
    pairs = frozenset({(0, 2), (1, 3)})
    assert topology().pairs(gpus_of_a_rank=2) == sorted(pairs)
    findings = judge_gpus(topology(readable=pairs, linked=frozenset({(0, 2)})), 2, 2)
    assert verdicts(findings) == {"NVLink": "warning"}
    assert [finding.seen for finding in findings if finding.check in ("peer access", "NVLink")] == [
        "all 2 pairs read each other",
        "only PCIe between 1 and 3",
    ]
    assert verdicts(judge_gpus(topology(), 3, 2)) == {"GPU": "warning"}
    (number, *_) = judge_gpus(topology(), 3, 2)
    assert number.advice.startswith("3 ranks need 2 each")

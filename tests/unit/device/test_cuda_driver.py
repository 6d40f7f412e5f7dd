"""The CUDA driver wrapper without a driver, and against cuda.h; with the fake driver: tests/cuda."""

import ctypes
import importlib.metadata
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from vllm_dwdp.device.cuda_driver import CudaDevice
from vllm_dwdp.errors import TransferError

ROOT = Path(__file__).parents[3]


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")
def test_without_a_driver_opening_a_device_says_so() -> None:
    for _ in range(2):
        with pytest.raises(
            TransferError, match=r"opening CUDA device 0 failed: no NVIDIA driver: "
        ):
            CudaDevice(0)


def other_header_folders() -> list[Path]:
    """Where a toolkit or Triton has brought one more `cuda.h`."""
    folders = [Path("/usr/local/cuda/include"), *Path("/usr/local").glob("cuda-*/include")]
    triton = importlib.util.find_spec("triton")
    for place in (triton.submodule_search_locations or []) if triton else []:
        folders.append(Path(place) / "backends" / "nvidia" / "include")
    return [folder for folder in folders if (folder / "cuda.h").exists()]


def compare_declarations(folder: Path) -> None:
    source = ROOT / "csrc" / "tests" / "cuda_declarations.cpp"
    command = ["g++", "-std=c++17", "-fsyntax-only", "-isystem", str(folder), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("package", "oldest"),
    [("nvidia-cuda-runtime-cu12", 12_090), ("nvidia-cuda-runtime", 13_000)],
)
def test_our_declarations_are_those_of_two_generations_of_cuda(package: str, oldest: int) -> None:
    """Drivers of both are met, and both headers come with the `dev` extra: never skipped."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.fail(f"{package} brings cuda.h and is not installed: pip install -e '.[dev]'")
    (header,) = (Path(str(file.locate())) for file in files if file.name == "cuda.h")
    version = re.search(r"^#define CUDA_VERSION (\d+)", header.read_text(), re.MULTILINE)
    assert version and oldest <= int(version[1]) < (oldest // 1000 + 1) * 1000
    compare_declarations(header.parent)


@pytest.mark.skipif(not other_header_folders(), reason="no further cuda.h on this machine")
@pytest.mark.parametrize("folder", other_header_folders(), ids=str)
def test_our_declarations_are_those_of_any_other_cuda_h(folder: Path) -> None:
    compare_declarations(folder)

"""The CUDA driver wrapper without a driver, and against cuda.h; with the fake driver: tests/cuda."""

import ctypes
import importlib.util
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


def cuda_header_folders() -> list[Path]:
    folders = [Path("/usr/local/cuda/include"), *Path("/usr/local").glob("cuda-*/include")]
    triton = importlib.util.find_spec("triton")
    for place in (triton.submodule_search_locations or []) if triton else []:
        folders.append(Path(place) / "backends" / "nvidia" / "include")
    return [folder for folder in folders if (folder / "cuda.h").exists()]


@pytest.mark.skipif(not cuda_header_folders(), reason="no cuda.h on this machine")
@pytest.mark.parametrize("folder", cuda_header_folders(), ids=str)
def test_our_declarations_are_those_of_cuda_h(folder: Path) -> None:
    source = ROOT / "csrc" / "tests" / "cuda_declarations.cpp"
    command = ["g++", "-std=c++17", "-fsyntax-only", "-isystem", str(folder), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

"""The CUDA driver wrapper: without a driver, against cuda.h, and with the fake driver.

The fake is no GPU: what passes here shows that the wrapper and the order of streams, events and
graphs keep the rules that the driver's reference states, not that hardware does.
"""

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_checks.fake_cuda import fake_cuda_environment
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


def run(scenario: str, **settings: object) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.unit.device.cuda_scenarios", scenario],
        cwd=ROOT,
        env=fake_cuda_environment(**settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0 and result.stdout == "ok\n", result.stderr


@pytest.mark.parametrize(
    "scenario",
    [
        "memory_rules",
        "released_memory_lives_while_mapped",
        "read_only_memory_cannot_be_written",
        "peers_and_ordinals",
        "nothing_is_left_after_close",
        "a_leak_is_noticed",
        "batch_copies_cannot_be_captured",
        "misuse_of_a_capture_is_an_error",
        "a_bad_copy_is_named",
        "an_empty_batch_is_ready",
    ],
)
def test_with_the_fake_driver(scenario: str) -> None:
    run(scenario)


@pytest.mark.multiprocess
def test_exported_memory_outlives_its_exporter() -> None:
    run("exported_memory_outlives_its_exporter")


def test_read_only_access_that_is_refused_has_its_own_error() -> None:
    run("read_only_access_that_is_refused_has_its_own_error", read_only=0)


def test_fabric_handles_are_passed_as_bytes() -> None:
    run("fabric_handles_are_passed_as_bytes", fabric=1)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "scenario",
    [
        "eager_steps_never_see_poison",
        "eager_steps_back_to_back",
        "the_default_stream_in_another_thread",
        "piecewise_graphs_with_copies_outside",
        "full_graph_with_copies_inside",
    ],
)
def test_no_delay_lets_compute_see_poison(scenario: str, seed: int) -> None:
    run(scenario, max_delay_us=700, seed=seed)


@pytest.mark.parametrize(
    "scenario",
    [
        "without_waiting_poison_is_seen",
        "without_recording_a_slot_is_overwritten",
        "piecewise_graphs_without_waits_see_poison",
    ],
)
def test_a_missing_event_shows(scenario: str) -> None:
    run(scenario, max_delay_us=700)


def test_an_older_driver_without_batch_copies_copies_one_by_one() -> None:
    run("eager_steps_never_see_poison", version=12070, max_delay_us=300)

"""The order of the bare copy queue: eager steps, graphs, and what breaks them."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gpu_checks import driver
from gpu_checks.compute_stream import ComputeStream
from gpu_checks.copy_ring import copy_ring
from gpu_checks.fake import fake_cuda_environment, fake_settings
from tests.cuda.conftest import is_older_driver
from vllm_dwdp.device.cuda_copies import CudaCopyQueue
from vllm_dwdp.device.cuda_driver import CudaDevice
from vllm_dwdp.errors import TransferError

ROOT = Path(__file__).parents[2]
seeds = pytest.mark.parametrize("seed", [1, 2])


@seeds
def test_eager_steps_never_see_poison(seed: int) -> None:
    with fake_settings(max_delay_us=700, seed=seed), copy_ring() as ring:
        ring.start()
        assert not ring.wrong_layers([ring.eager_step], 10)
        assert ring.queue.uses_batch_copy != is_older_driver()


@seeds
def test_eager_steps_back_to_back_never_see_poison(seed: int) -> None:
    with fake_settings(max_delay_us=700, seed=seed), copy_ring() as ring:
        ring.start()
        assert not ring.wrong_layers([ring.eager_step], 10, at_once=True)


@seeds
def test_the_default_stream_in_another_thread_never_sees_poison(seed: int) -> None:
    """A thread without a current context, and compute on the legacy default stream."""
    with fake_settings(max_delay_us=700, seed=seed), copy_ring() as ring:
        wrong: list[object] = []

        def steps() -> None:
            try:
                with ComputeStream(handle=0) as ring.stream:
                    assert ring.stream.handle == 0
                    ring.start()
                    wrong.extend(ring.wrong_layers([ring.eager_step], 10))
            except BaseException as error:
                wrong.append(error)

        own = ring.stream
        thread = threading.Thread(target=steps)
        thread.start()
        thread.join()
        ring.stream = own
        assert wrong == []


@seeds
def test_full_graphs_among_eager_steps_never_see_poison(seed: int) -> None:
    with fake_settings(max_delay_us=700, seed=seed), copy_ring() as ring:
        replay = ring.full_step()
        ring.start()
        assert not ring.wrong_layers([replay] * 2, 4)
        assert not ring.wrong_layers([replay, ring.eager_step], 4, at_once=True)


@pytest.mark.parametrize("missing", [{"wait": False}, {"record": False}], ids=str)
def test_a_missing_event_shows_in_eager_steps(missing: dict[str, bool]) -> None:
    with fake_settings(max_delay_us=700), copy_ring() as ring:
        ring.start()
        ring.queue.drain()
        seen = ring.wrong_layers([lambda: ring.eager_step(**missing)], 10)
    assert seen, "a missing event must show, or the other tests prove nothing"


def test_an_older_driver_without_batch_copies_copies_one_by_one() -> None:
    """The wrapper looks functions up once, so this needs a process of its own."""
    if is_older_driver():
        pytest.skip("this is that process")
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda/test_rings.py"]
        + ["tests/cuda/test_driver_ring.py", "-k", "never_see_poison or test_rings"],
        cwd=ROOT,
        env=fake_cuda_environment(version=12070),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "skipped" not in ended.stdout, ended.stdout


def test_misuse_of_a_capture_is_an_error() -> None:
    driver.capture_misuse()


def test_copies_are_not_issued_into_a_capture_that_would_lack_them() -> None:
    """Our words, and what the driver does to whom nobody stops: 900, and a graph without the copy."""
    assert driver.batch_copy_under_capture() == (
        "`issue` refuses; the driver: cuMemcpyBatchAsync returned 900 "
        "(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED); a replay brings the copy before it, the copy after it"
    )


def test_a_bad_copy_is_named() -> None:
    with CudaDevice(0) as device, CudaCopyQueue(device) as queue:
        batch = queue.add_batch([[(0x1000, 0x2000, 0), (0x3000, 0, 5)]])
        with pytest.raises(
            TransferError,
            match=r"cuMemcpyBatchAsync\(2 copies, .*\), copy 1 \(0x3000, 0, 5\), returned 1 \(CUDA_",
        ):
            queue.issue(batch, None)


def test_an_empty_batch_is_ready() -> None:
    driver.empty_batch()


def test_an_order_that_cannot_run_is_reported() -> None:
    """Else a test that meets one would hang. In a process of its own: it is broken afterwards."""
    ended = subprocess.run(
        [sys.executable, "-c", STALL], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "CUDA_ERROR_LAUNCH_TIMEOUT" in ended.stderr.splitlines()[-1], ended.stderr
    assert "fake CUDA: the host and every stream wait: given up after 300 ms" in ended.stderr
    assert "the wait is enqueued" in ended.stdout and "the fill is issued" not in ended.stdout


STALL = """
import ctypes, threading
from gpu_checks.compute_stream import ComputeStream
from gpu_checks.fake import fake_settings

filled = threading.Event()
kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: filled.wait(10))
with fake_settings(queue_depth=2, stall_ms=300):
    stream = ComputeStream()
    print("the wait is enqueued", flush=True)
    for _ in range(3):  # looks when it runs, for a fill that the host issues behind it
        stream._context.call("cuLaunchHostFunc", stream._stream, kernel, None)
    print("the fill is issued", flush=True)
    filled.set()
"""

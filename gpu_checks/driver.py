"""Questions about the driver and our wrapper of it: copies, captures, what is here.

Each function that `gpu_checks.questions` names is one question: it returns what it found, and fails by
an exception. What the fake driver assumes of a real one is asked here.
"""

import ctypes
import re
import time
from collections.abc import Callable

import torch

from gpu_checks.accelerator import accelerator
from gpu_checks.copy_ring import copy_ring, when_waits_look, wrong_layers_of_graphs
from gpu_checks.driver_memory import PAGE, driver_call
from vllm_dwdp.device.cuda_driver import CudaCopyQueue, CudaDevice, HandleType
from vllm_dwdp.errors import DwdpError

# --- copies and captures -------------------------------------------------------------------------


def driver_ring(way: str) -> str:
    """Run steps one by one, or back to back, on the bare copy queue."""
    with copy_ring() as ring:
        ring.start()
        wrong = ring.wrong_layers([ring.eager_step], 10, at_once=way == "back_to_back")
    assert not wrong, f"wrong layers {wrong}"
    return "every layer is right"


def empty_batch() -> str:
    """Issue a batch of a layer that has nothing to copy."""
    with CudaDevice(0) as device, CudaCopyQueue(device) as queue:
        batch = queue.add_batch([])
        queue.issue(batch, batch)
        queue.drain()
        assert queue.is_done(batch), "an empty batch is not done"
    return "it is"


def batch_copy_under_capture() -> str:
    """Let the copy stream join a capture, then issue a fill as usual."""
    with copy_ring() as ring:
        queue, batches, stream = ring.queue, ring.batches, ring.stream
        if not queue.uses_batch_copy:
            return "this driver has no batch copies"
        stream.begin_capture()
        queue.capture_record(batches[0], stream.handle)
        queue.capture_fill(batches[2], batches[0], stream.handle)
        said = refusal(lambda: queue.issue(batches[3], None))
        assert re.match(r"issuing copies failed: .* returned \d+ \(CUDA_", said), (
            f"{said}: THE COPY VANISHED SILENTLY"
        )
        ended = ""
        try:
            stream.end_capture().close()
        except DwdpError as error:
            ended = f"; the capture then ends with {error}"
        for batch in batches[:2]:
            queue.issue(batch, None)  # a failed capture leaves the queue usable
        assert not ring.wrong_layers([ring.eager_step], 2), "wrong layers after the capture"
    documented = re.search(
        r"cuMemcpyBatchAsync\(2 copies, 0x[0-9a-f]+\) returned 900 "
        r"\(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED\)",
        said,
    )
    return f"refused{' as documented' if documented else ''}: {said}{ended}"


def refusal(call: Callable[[], object]) -> str:
    """Return what a call that must fail says."""
    try:
        call()
    except DwdpError as error:
        return str(error)
    return "nothing was refused"


def capture_misuse() -> str:
    """Misuse a capture in every way, then run a step."""
    with copy_ring() as ring:
        queue, batches, stream = ring.queue, ring.batches, ring.stream
        checks: list[tuple[Callable[[], object], str]] = [
            (lambda: queue.wait_external(batches[0], stream.handle), "INVALID_VALUE"),
            (lambda: queue.record_external(batches[0], stream.handle), "INVALID_VALUE"),
            (
                lambda: queue.capture_record(batches[0], stream.handle),
                "marking a consumed slot .* is not capturing",
            ),
            (
                lambda: queue.capture_fill(batches[2], batches[0], stream.handle),
                "filling a slot in a graph: .* is not capturing",
            ),
        ]
        expect_refusals(checks)
        ring.full_step()
        stream.begin_capture()
        expect_refusals(
            [
                (
                    lambda: queue.capture_fill(batches[2], batches[0], stream.handle),
                    "consumed in the same capture: call capture_record",
                )
            ]
        )
        assert queue.is_done(batches[0]), "asking is allowed during a capture"
        expect_refusals(
            [
                (
                    lambda: queue.wait(batches[0], stream.handle),
                    r"\(CUDA_ERROR_STREAM_CAPTURE_ISOLATION\)",
                ),
                (
                    lambda: queue.capture_record(batches[0], stream.handle),
                    "an earlier error invalidated",
                ),
                (stream.end_capture, r"\(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED\)"),
            ]
        )
        ring.start()
        wrong = ring.wrong_layers([ring.eager_step], 1)
        assert not wrong, f"a failed capture left the queue unusable: {wrong}"
    return "every misuse is refused as documented"


def expect_refusals(checks: list[tuple[Callable[[], object], str]]) -> None:
    """Check that each call fails with a message that its pattern matches."""
    for call, pattern in checks:
        said = refusal(call)
        assert re.search(pattern, said), f"{said!r} does not say {pattern!r}"


def external_waits() -> str:
    """Find out when a wait node looks at its event."""
    return when_waits_look()


def external_order(kind: str) -> str:
    """Replay graphs with external nodes while copies are late."""
    wrong = wrong_layers_of_graphs(kind)
    return f"no: wrong layers {sorted(wrong)}" if wrong else "yes, every layer is right"


# --- the device ----------------------------------------------------------------------------------


def which_device() -> str:
    """Describe what everything else depends on."""
    gpu = accelerator()
    with CudaDevice(0) as device:
        kinds: tuple[HandleType, ...] = ("posix_fd", "fabric", "both")
        made = [kind for kind in kinds if device.makes_handles(kind)]
        largest = max(device.granularity_of(kind) for kind in ("none", *made))
        text = (
            f"{gpu.describe()}; granularity {device.granularity_bytes // 1024} KiB, "
            f"{device.free_bytes / 2**30:.1f} of {device.total_bytes / 2**30:.1f} GiB free, "
            f"memory handles that can be made: {', '.join(made) or 'none'}, "
            f"in pages of up to {largest // 1024} KiB"
        )
        with CudaCopyQueue(device) as queue:
            text += f", batch copies {'in use' if queue.uses_batch_copy else 'missing'}"
        assert 16 * 2**20 % largest == 0, f"pool pages do not fit: {text}"
    return text


def partial_mappings() -> str:
    """Map less than an allocation."""
    found = []
    with CudaDevice(0) as device:
        page = device.granularity_bytes
        for what, offset in (
            ("starts one page into", page),
            ("ends one page before the end of", 0),
        ):
            address = device.reserve(2 * page)
            handle = device.create(2 * page, handle_type="posix_fd")
            status = driver_call(
                "cuMemMap",
                ctypes.c_uint64(address),
                ctypes.c_size_t(page),
                ctypes.c_size_t(offset),
                ctypes.c_uint64(handle),
                ctypes.c_ulonglong(0),
            )
            if status == 0:
                device.unmap(address, page)
            device.release(handle)
            device.free_address(address, 2 * page)
            verdict = "is accepted" if status == 0 else f"is refused with status {status}"
            found.append(f"a mapping that {what} an allocation {verdict}")
    return "; ".join(found)


def copy_speed() -> str:
    """Compare our slices with one copy of torch's."""
    gpu = accelerator()
    num_bytes = 2**28 if gpu.is_real else 2**22
    found = []
    target = torch.empty(num_bytes, dtype=torch.uint8, device=gpu.device)
    sources = {
        "within the device": torch.ones(num_bytes, dtype=torch.uint8, device=gpu.device),
        "pinned host to device": gpu.pinned(num_bytes),
    }
    gpu.synchronize()
    with CudaDevice(0) as device, CudaCopyQueue(device) as queue:
        for name, source in sources.items():
            addresses = target.data_ptr(), source.data_ptr()
            slices = [
                (addresses[0] + start, addresses[1] + start, PAGE)
                for start in range(0, num_bytes, PAGE)
            ]
            batch = queue.add_batch(slices)

            def ours(batch: int = batch) -> None:
                queue.issue(batch, None)
                queue.drain()

            def plain(source: torch.Tensor = source) -> None:
                target.copy_(source, non_blocking=True)
                gpu.synchronize()

            speeds = [num_bytes / 1e9 / best_seconds(action) for action in (ours, plain)]
            found.append(f"{name} {speeds[0]:.0f} GB/s in 2 MiB slices, torch {speeds[1]:.0f} GB/s")
    return "; ".join(found) + " (bytes moved once)"


def best_seconds(action: Callable[[], object]) -> float:
    """Return the best time of ten."""
    action()
    times = []
    for _ in range(10):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)

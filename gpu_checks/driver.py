"""Questions about the driver and our wrapper of it: copies, captures, what is here.

Each function that `gpu_checks.questions` names is one question: it returns what it found, and fails by
an exception. What the fake driver assumes of a real one is asked here.
"""

import ctypes
import random
import re
from collections.abc import Callable

from gpu_checks.accelerator import accelerator
from gpu_checks.compute_stream import BatchCopies, ComputeStream
from gpu_checks.copy_ring import SLOT_BYTES, CopyRing, copy_ring
from gpu_checks.driver_memory import PAGE, driver_call, mapped
from vllm_dwdp.device.cuda_copies import CudaCopyQueue
from vllm_dwdp.device.cuda_driver import CudaDevice, HandleType
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
    """Let the copy stream join a capture and issue a fill; then ask the driver itself, and replay."""
    with copy_ring() as ring:
        queue, batches, stream = ring.queue, ring.batches, ring.stream
        stream.begin_capture()
        queue.capture_record(batches[0], stream.handle)
        queue.capture_fill(batches[2], batches[0], stream.handle)
        said = refusal(lambda: queue.issue(batches[3], None))
        assert "part of a graph that is being captured" in said, f"{said}: A FILL WOULD VANISH"
        stream.end_capture().close()  # what was refused has not spoilt the capture
        ring.start()
        assert not ring.wrong_layers([ring.eager_step], 2), "wrong layers after the capture"
        return f"`issue` refuses; the driver: {_what_a_graph_lacks(ring)}"


def _what_a_graph_lacks(ring: CopyRing) -> str:
    """Capture a copy, a batch copy and another copy; say what a replay brings of the three."""
    stream, brought = ring.stream, []
    copies = [
        (ring.outputs + layer * SLOT_BYTES, ring.sources + layer * SLOT_BYTES, SLOT_BYTES)
        for layer in range(3)
    ]
    ring.device.write(ring.outputs, bytes(3 * SLOT_BYTES))
    stream.begin_capture()
    stream.copy(*copies[0])
    said = refusal(lambda: stream.copy_batch(BatchCopies([copies[1]], overlap=False)))
    stream.copy(*copies[2])
    try:
        graph = stream.end_capture()
    except DwdpError as error:
        return f"{said}; the capture then ends with {error}"
    graph.launch(stream)
    stream.synchronize()
    for layer, (address, _source, num_bytes) in enumerate(copies):
        if ring.device.read(address, num_bytes) == ring.expected(layer):
            brought.append(("the copy before it", "the batch copy", "the copy after it")[layer])
    graph.close()
    return f"{said}; a replay brings {', '.join(brought) or 'nothing'}"


def long_copies(way: str) -> str:
    """Copy a run of bytes that lies in several allocations on both sides, cut at other places."""
    source_sizes, target_sizes = (8 * PAGE, PAGE, 8 * PAGE), (PAGE, 8 * PAGE, 8 * PAGE)
    num_bytes = sum(source_sizes) - PAGE
    with (
        CudaDevice(0) as device,
        mapped(device, *source_sizes, handle_type="none") as (source, _),
        mapped(device, *target_sizes, handle_type="none") as (target, _),
        CudaCopyQueue(device) as queue,
        ComputeStream() as stream,
    ):
        content = random.Random(0).randbytes(num_bytes)
        device.write(source + 512, content)
        device.write(target, bytes(num_bytes + 512))
        batch = queue.add_batch([[(target + 256, source + 512, num_bytes)]])
        if way == "graph":
            stream.begin_capture()
            queue.capture_record(batch, stream.handle)
            queue.capture_fill(batch, batch, stream.handle)
            graph = stream.end_capture()
            graph.launch(stream)
            stream.synchronize()
            graph.close()
        else:
            queue.issue(batch, None)
            queue.drain()
        arrived = device.read(target, num_bytes + 512)
    assert arrived[256:-256] == content, "other bytes arrived"
    assert not any(arrived[:256] + arrived[-256:]), "bytes beside the copy changed"
    return f"one copy of {num_bytes / 2**20:.0f} MiB over three allocations on each side is right"


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
            text += f", CUDA driver {queue.driver_version}"
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

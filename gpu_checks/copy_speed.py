"""The question how fast copies are: by size of slices, by way to ask for them, and by flag."""

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch

from gpu_checks.accelerator import Accelerator, accelerator
from gpu_checks.compute_stream import BatchCopies, ComputeStream, Graph
from gpu_checks.copy_ring import copy_ring

ENOUGH = 0.95
"""Of the speed of one whole copy: slices of that size are large enough."""
MUCH_SLOWER = 0.5
"""With less than this of the speed, a flag decides what moves the bytes."""
WAYS = ("batch", "batch, overlap flag", "single", "graph")

Speeds = Mapping[str, Mapping[int, float]]
"""GB/s, bytes moved once, by way and by bytes of a slice; the largest size is one whole copy."""


def copy_speed() -> str:
    """Copy within the device and from pinned host memory, on a stream that is kept busy meanwhile."""
    gpu = accelerator()
    num_bytes = 2**30 if gpu.is_real else 2**22
    mib = (2, 16, 64) if gpu.is_real else (1, 2)
    sizes = [*(each * 2**20 for each in mib), num_bytes]
    found = [f"CUDA driver {_driver_version()}"]
    with ExitStack() as stack:
        stack.callback(gpu.open_memory().close)
        stack.enter_context(gpu.on_stream())
        stream = stack.enter_context(ComputeStream(handle=gpu.current_stream()))
        target = torch.empty(num_bytes, dtype=torch.uint8, device=gpu.device)
        places = {
            "within the device": torch.ones(num_bytes, dtype=torch.uint8, device=gpu.device),
            "from pinned host memory": gpu.pinned(num_bytes),
        }
        for place, source in places.items():
            speeds: dict[str, dict[int, float]] = {way: {} for way in WAYS}
            for size in sizes:
                slices = [
                    (target.data_ptr() + at, source.data_ptr() + at, min(size, num_bytes - at))
                    for at in range(0, num_bytes, size)
                ]
                for way in WAYS:
                    speeds[way][size] = num_bytes / 1e6 / _milliseconds(gpu, stream, way, slices)
            found.append(f"{place}, {judge_speeds(speeds)}: {_listed(speeds)}")
    return "; ".join(found) + " (bytes moved once)"


def judge_speeds(speeds: Speeds) -> str:
    """Say which slices are large enough, and whether the flag decides what moves the bytes."""
    batch, flagged = speeds["batch"], speeds["batch, overlap flag"]
    whole = max(batch)
    enough = min(size for size in batch if flagged[size] >= ENOUGH * flagged[whole])
    said = f"with the flag {_size(enough)} reach {ENOUGH:.0%} of a whole copy"
    if flagged[whole] < MUCH_SLOWER * batch[whole]:
        said += ", THE FLAG MAKES COPIES SLOWER BY " + f"{batch[whole] / flagged[whole]:.0f}x"
    elif batch[whole] < MUCH_SLOWER * flagged[whole]:
        said += ", THE FLAG MAKES COPIES FASTER BY " + f"{flagged[whole] / batch[whole]:.0f}x"
    else:
        said += ", and it changes little"
    return said


def _milliseconds(
    gpu: Accelerator, stream: ComputeStream, way: str, slices: list[tuple[int, int, int]]
) -> float:
    """Measure the device's time: copies are enqueued behind a kernel that spins."""
    graph: Graph | None = None
    enqueue: Callable[[], None]
    if way.startswith("batch"):
        batch = BatchCopies(slices, overlap="flag" in way)

        def enqueue() -> None:
            stream.copy_batch(batch)
    elif way == "graph":
        stream.begin_capture()
        for each in slices:
            stream.copy(*each)
        graph = stream.end_capture()
        captured = graph

        def enqueue() -> None:
            captured.launch(stream)
    else:

        def enqueue() -> None:
            for each in slices:
                stream.copy(*each)

    def measured() -> float:
        gpu.pause(10_000)
        return gpu.milliseconds(enqueue)

    enqueue()
    times = [measured() for _ in range(5 if gpu.is_real else 1)]
    stream.synchronize()
    if graph is not None:
        graph.close()
    return statistics.median(times)


def _driver_version() -> str:
    with copy_ring() as ring:
        return ring.queue.driver_version


def _listed(speeds: Speeds) -> str:
    return (
        ", ".join(
            f"{way} " + " / ".join(f"{speed:.0f}" for speed in by_size.values()) + " GB/s"
            for way, by_size in speeds.items()
        )
        + " in slices of "
        + " / ".join(_size(size) for size in next(iter(speeds.values())))
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:g} MiB"

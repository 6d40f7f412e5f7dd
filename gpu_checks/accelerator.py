"""What GPU tests and benchmarks need of torch.cuda, and a stand-in so that they run where no GPU is.

`accelerator()` is the GPU, or, in a process started with `simulated_environment()`, the CPU over the
fake driver: NOT A GPU, and no evidence about one. There it only shows that the programs run: a
"graph" is its function called again, and kernels are CPU kernels. Nothing of this ran on hardware so
far (docs/gpu.md).
"""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from gpu_checks.fake import SIMULATED_ENV
from vllm_dwdp.device.cuda import CudaMemory


class Accelerator(Protocol):
    """One device, as this process's first one."""

    @property
    def is_real(self) -> bool:
        """Whether this is a GPU."""

    @property
    def device(self) -> torch.device:
        """Where torch's tensors live."""

    def describe(self) -> str:
        """Describe device, driver and torch in one line."""

    def open_memory(self) -> CudaMemory:
        """Open its memory behind the product's seam; the caller closes it."""

    def current_stream(self) -> int:
        """Return the CUstream that this thread's kernels go to."""

    def on_stream(self) -> Any:
        """Return a context manager in which kernels go to a new stream."""

    def pause(self, microseconds: int) -> None:
        """Enqueue a kernel that takes about this long at least; may be captured."""

    def capture(self, body: Callable[[], object]) -> Callable[[], None]:
        """Capture what `body`, which has run before, enqueues; return its replay."""

    def milliseconds(self, body: Callable[[], object]) -> float:
        """Measure how long the device takes for what `body` enqueues."""

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Allocate host memory that copy engines can read."""

    def synchronize(self) -> None:
        """Block until the device is idle."""

    def release_memory(self) -> None:
        """Return what freed tensors and graphs had to the device."""


class Gpu:
    """The GPU through torch.cuda."""

    is_real = True

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)
        torch.empty(1, device=self.device)  # torch's context is the primary one, made now
        self._pool = torch.cuda.graph_pool_handle()

    def describe(self) -> str:
        """Describe name, driver, torch and CUDA."""
        properties = torch.cuda.get_device_properties(self.device)
        driver = "unknown driver"
        try:
            import pynvml

            pynvml.nvmlInit()
            driver = f"driver {pynvml.nvmlSystemGetDriverVersion()}"
        except Exception as error:
            driver = f"driver version not known ({type(error).__name__})"
        return (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} multiprocessors, {driver}, "
            f"torch {torch.__version__}, CUDA {torch.version.cuda}"
        )

    def open_memory(self) -> CudaMemory:
        """Open the product's CUDA device."""
        return CudaMemory(0)

    def current_stream(self) -> int:
        """Return torch's current stream."""
        return int(torch.cuda.current_stream().cuda_stream)

    def on_stream(self) -> Any:
        """Use a new torch stream, once the device is idle."""
        torch.cuda.synchronize()
        return torch.cuda.stream(torch.cuda.Stream())

    def pause(self, microseconds: int) -> None:
        """Spin in a kernel; the clock is at most 2 GHz."""
        torch.cuda._sleep(microseconds * 2000)

    def capture(self, body: Callable[[], object]) -> Callable[[], None]:
        """Make a `torch.cuda.CUDAGraph`; all share one pool, as vLLM's do, so replay one at a time."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            body()
        replay: Callable[[], None] = graph.replay
        return replay

    def milliseconds(self, body: Callable[[], object]) -> float:
        """Measure between two events on the current stream."""
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        body()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Allocate page-locked memory."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def synchronize(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize()

    def release_memory(self) -> None:
        """Collect garbage, then empty torch's cache."""
        gc.collect()
        torch.cuda.empty_cache()


class SimulatedGpu:
    """The CPU over the fake driver. NOT A GPU."""

    is_real = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._stream = 0

    def describe(self) -> str:
        """Say that this is no GPU."""
        return f"NOT A GPU: the fake driver and CPU kernels, torch {torch.__version__}"

    def open_memory(self) -> CudaMemory:
        """Open the CUDA device over the fake driver."""
        from gpu_checks.simulated_cuda import SimulatedCudaMemory

        memory = SimulatedCudaMemory()
        self._stream = memory._compute.handle
        return memory

    def current_stream(self) -> int:
        """Return the stream that stands for the kernels'; memory must be open."""
        return self._stream

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Do nothing: there is one stream."""
        yield

    def pause(self, microseconds: int) -> None:
        """Do nothing: CPU kernels have returned when the next is called."""

    def capture(self, body: Callable[[], object]) -> Callable[[], None]:
        """Return a function that calls `body` again."""
        return lambda: (body(), None)[1]

    def milliseconds(self, body: Callable[[], object]) -> float:
        """Measure host time."""
        started = time.perf_counter()
        body()
        return (time.perf_counter() - started) * 1e3

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Allocate plain memory."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def synchronize(self) -> None:
        """Do nothing: CPU kernels have returned."""

    def release_memory(self) -> None:
        """Collect garbage."""
        gc.collect()


def accelerator() -> Accelerator:
    """Return the accelerator that this process was started for.

    Raises:
        RuntimeError: there is no GPU and none is simulated.
    """
    if os.environ.get(SIMULATED_ENV) == "1":
        return SimulatedGpu()
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"no CUDA device is visible to torch {torch.__version__}. Run this on a GPU machine; "
            f"{SIMULATED_ENV}=1 with the fake driver only checks that the program runs."
        )
    return Gpu()

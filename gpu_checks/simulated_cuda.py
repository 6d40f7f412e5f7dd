"""A rank on the CPU whose expert memory is the CUDA device's, over the fake driver. NOT A GPU.

vLLM's CPU kernels read composite tensors that `device.cuda` assembled, and `device.cuda_queue` fills
its slots; so everything of the CUDA device but the hardware runs in a real engine. Only in processes
that were started with `fake_cuda_environment()`. Kernels run on the host, when they are called: a
stream plays their part, and every wait for it blocks.
"""

import torch

from gpu_checks.compute_stream import ComputeStream
from vllm_dwdp.device.cuda import CudaMemory
from vllm_dwdp.device.cuda_queue import CudaQueue
from vllm_dwdp.device.limits import release_free_heap


class SimulatedCudaMemory(CudaMemory):
    """The CUDA device with torch's CPU tensors over its (host) addresses.

    Args:
        carries_fds: whether file descriptors reach the peers; else fabric handles must.
    """

    def __init__(self, *, carries_fds: bool = True) -> None:
        super().__init__(
            0,
            torch_device=torch.device("cpu"),
            clear_cache=release_free_heap,
            carries_fds=carries_fds,
        )
        self._compute = ComputeStream()

    def make_queue(self) -> "SynchronousQueue":
        """Make a copy stream beside a compute stream that the host waits for."""
        return SynchronousQueue(self, self._compute)

    def close(self) -> None:
        """Destroy the stream, then the device."""
        self._compute.close()
        super().close()


class SynchronousQueue(CudaQueue):
    """A `CudaQueue` for kernels that run on the host as soon as `wait` returns."""

    def __init__(self, memory: CudaMemory, compute: ComputeStream) -> None:
        super().__init__(memory.device, lambda: compute.handle)
        self._compute = compute

    def wait(self, batch: int) -> float:
        """Block until the fill is done."""
        super().wait(batch)
        self._compute.synchronize()
        return 0.0

"""The worker of a rank on an NVIDIA GPU. Never run on one so far: see docs/gpu.md."""

import torch
from vllm.v1.worker.gpu_worker import Worker

from vllm_dwdp.compat import independent
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.executor.worker import DwdpWorker
from vllm_dwdp.memory.cuda import CudaMemory
from vllm_dwdp.memory.device import Device


class DwdpGPUWorker(DwdpWorker, Worker):
    """vLLM's GPU worker as a member of a group.

    vLLM sizes the KV cache by the device's free memory before and after, which sees shards, slots and
    nothing of the peers', so nothing has to be corrected here.
    """

    device: torch.device

    def make_device(self) -> Device:
        """The GPU that vLLM gave this worker."""
        launch = independent.launch_of(self.vllm_config)
        return CudaMemory(self.device.index, fabric=not Endpoint.of(launch).carries_fds)

"""The worker of a rank on an NVIDIA GPU. Never run on one so far: see docs/gpu.md."""

from contextlib import closing

import torch
from vllm.v1.worker.gpu_worker import Worker

from vllm_dwdp.compat.worker import gpu
from vllm_dwdp.device.base import Device
from vllm_dwdp.device.cuda import CudaMemory
from vllm_dwdp.executor.worker import DwdpWorker


class DwdpGPUWorker(DwdpWorker, Worker):
    """vLLM's GPU worker as a member of a group.

    vLLM sizes the KV cache by the device's free memory before and after loading, which sees new shards
    and slots. The shard of an earlier life was there before: it is declared as weights held outside, so
    that neither the start is refused for want of free memory nor the cache grows by what it takes.
    """

    device: torch.device

    def make_device(self) -> Device:
        """The GPU that vLLM gave this worker."""
        carries_fds = self.seat.launch.endpoint.carries_fds
        return CudaMemory(self.device.index, fabric=not carries_fds)

    def init_device(self) -> None:
        """As vLLM's, which measures the device's memory here."""
        with gpu.weights_held_outside(self._kept_bytes):
            super().init_device()

    def _kept_bytes(self) -> int:
        """Bytes of this GPU that peers hold for us, whole: we will adopt them."""
        if not self.seat.launch.config.shares_experts:
            return 0
        with closing(self.make_device()) as device:
            page_bytes = device.page_bytes
        with self.make_membership(page_bytes) as rendezvous:
            return rendezvous.kept_bytes()

"""The worker of a rank on an NVIDIA GPU. Never run on one so far: see docs/gpu.md."""

from contextlib import ExitStack

import torch
from vllm.v1.worker.gpu_worker import Worker

from vllm_dwdp.compat.worker import gpu
from vllm_dwdp.device.base import Device
from vllm_dwdp.device.cuda import CudaMemory
from vllm_dwdp.device.freed import wait_until_freed
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.executor.worker import DwdpWorker


class DwdpGPUWorker(DwdpWorker, Worker):
    """vLLM's GPU worker as a member of a group.

    vLLM sizes the KV cache by the device's free memory before and after loading, which sees new shards
    and slots. The shard of an earlier start was there before: it is declared as weights held outside, so
    that neither the start is refused for want of free memory nor the cache grows by what it takes. So
    the rank joins its group before vLLM measures, and loads its model as the member that it is by then.
    """

    device: torch.device
    _opened: tuple[Device, Membership] | None = None
    _resources: ExitStack

    def make_device(self) -> Device:
        """Return the GPU that vLLM gave this worker."""
        carries_fds = self.seat.launch.endpoint.carries_fds
        return CudaMemory(self.device.index, carries_fds=carries_fds)

    def init_device(self) -> None:
        """As vLLM's, which measures the device's memory here."""
        with ExitStack() as undo, gpu.weights_held_outside(lambda: self._join_early(undo)):
            super().init_device()
            self._resources = undo.pop_all()

    def _join_early(self, undo: ExitStack) -> int:
        """Join the group; how many bytes of this GPU its peers hold for us, which we will adopt.

        What the process that was this rank before still holds is waited for: vLLM looks once.
        """
        if not self.seat.launch.config.shares_experts:
            return 0
        self._opened = device, membership = super().open_membership(undo)
        held_bytes = membership.returning.num_bytes
        needed_bytes = gpu.requested_bytes(self.vllm_config, device.memory_info()[1]) - held_bytes
        wait_until_freed(device, needed_bytes, self.seat.rank)
        return held_bytes

    def open_membership(self, undo: ExitStack) -> tuple[Device, Membership]:
        """Hand over what `init_device` opened."""
        if self._opened is None:
            return super().open_membership(undo)
        opened, self._opened = self._opened, None
        undo.enter_context(self._resources.pop_all())
        return opened

    def shutdown(self) -> None:
        """As `DwdpWorker.shutdown`, also where no model was loaded."""
        super().shutdown()
        if self._opened is not None:
            self._opened = None
            self._resources.close()

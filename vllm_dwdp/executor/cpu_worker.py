"""The worker of a rank on the host device."""

import os
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_dwdp.compat.worker import cpu
from vllm_dwdp.device.base import Device
from vllm_dwdp.device.host import HostDevice
from vllm_dwdp.executor.shared_cores import announce_cores
from vllm_dwdp.executor.worker import DwdpWorker


class DwdpCPUWorker(DwdpWorker, CPUWorker):
    """vLLM's CPU worker as a member of a group."""

    def make_device(self) -> Device:
        """Shared memory of this host, which no kernel may write to."""
        cpu.keep_weights_as_they_are()
        return HostDevice()

    def init_device(self) -> None:
        """As vLLM's; then nothing of it has a name that a killed worker would leave behind."""
        super().init_device()
        cpu.forget_names_of_messages()

    def load_model(self, **kwargs: Any) -> None:
        """As `DwdpWorker`; then look whether another rank computes on the same cores."""
        super().load_model(**kwargs)
        if self.expert_group is not None:
            announce_cores(self.expert_group, os.sched_getaffinity(0))

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache, counting shared expert memory once."""
        with cpu.proportional_memory(self.parallel_config.world_size):
            return int(super().determine_available_memory())

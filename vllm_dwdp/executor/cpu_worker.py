"""The worker of a rank on the host device."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_dwdp.compat.worker import cpu
from vllm_dwdp.device.base import Device
from vllm_dwdp.device.host import HostDevice
from vllm_dwdp.executor.worker import DwdpWorker


class DwdpCPUWorker(DwdpWorker, CPUWorker):
    """vLLM's CPU worker as a member of a group."""

    def make_device(self) -> Device:
        """Shared memory of this host."""
        return HostDevice()

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache, counting shared expert memory once."""
        with cpu.proportional_memory():
            return int(super().determine_available_memory())

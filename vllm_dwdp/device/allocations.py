"""Device memory without addresses, and several of its allocations as one run of bytes."""

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_dwdp.device.cuda_driver import CudaDevice


@dataclass(frozen=True)
class Allocation:
    """Device memory; its maker or importer releases `handle` once.

    Args:
        is_peers: another rank made it, so it may lie on another GPU.
    """

    handle: int
    num_bytes: int
    is_peers: bool = False


class Allocations:
    """Allocations one after the other, addressed by byte offset; `release` gives the handles back.

    What is mapped stays: mappings hold the memory, not the handles.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._allocations: dict[int, Allocation] = {}
        self.num_bytes = 0

    def add(self, allocation: Allocation) -> None:
        """Append an allocation, owned from now on."""
        self._allocations[self.num_bytes] = allocation
        self.num_bytes += allocation.num_bytes

    def between(self, offset: int, num_bytes: int) -> Iterator[Allocation]:
        """Yield the whole allocations that make up `[offset, offset + num_bytes)`."""
        end = offset + num_bytes
        while offset < end:
            allocation = self._allocations[offset]
            assert offset + allocation.num_bytes <= end, "a segment ends within an allocation"
            yield allocation
            offset += allocation.num_bytes

    def __iter__(self) -> Iterator[Allocation]:
        return iter(self._allocations.values())

    def release(self) -> None:
        """Release every handle."""
        while self._allocations:
            self._device.release(self._allocations.popitem()[1].handle)

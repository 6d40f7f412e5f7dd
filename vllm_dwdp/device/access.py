"""What is tried where a driver refuses access to a range of device memory.

Drivers differ in whether they map memory read-only, and whether one call may cover several allocations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_dwdp.device.allocations import Allocation
from vllm_dwdp.device.cuda_driver import AccessRefusedError, CudaDevice
from vllm_dwdp.errors import DwdpMemoryError
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)


@dataclass(frozen=True)
class Access:
    """A way to make a range accessible: writable or not, in one call or one for each allocation."""

    writable: bool
    piecewise: bool


_WAYS = tuple(
    Access(writable, piecewise) for writable in (False, True) for piecewise in (False, True)
)
"""What is tried, best first: protection is worth more than calls."""


class RangeAccess:
    """Gives a device access to ranges over whole allocations; says once what it could not have.

    Args:
        device: the device; the caller closes it.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self.best = _WAYS[0]
        """Tried before those that follow it in `_WAYS`."""
        self._accepted: dict[tuple[bool, bool, bool], Access] = {}
        self._said: set[str] = set()

    def allow(self, address: int, allocations: Sequence[Allocation], *, writable: bool) -> None:
        """Set access in the best way that the driver accepts for such a range, and remember it.

        Args:
            address: of the first byte; the allocations are mapped there one after the other.
            writable: whether it must be; else it is where the driver can do nothing better.

        Raises:
            DwdpMemoryError: it accepts none.
        """
        is_mixed = len({each.is_peers for each in allocations}) > 1
        kind = (writable, is_mixed, len(allocations) > 1)
        best = Access(writable or self.best.writable, self.best.piecewise)
        first = self._accepted.get(kind, best)
        refusals: list[AccessRefusedError] = []
        for way in _WAYS[_WAYS.index(first) :]:
            if way.piecewise and len(allocations) == 1:
                continue
            try:
                self._set_access(address, allocations, way)
            except AccessRefusedError as error:
                refusals.append(error)
                continue
            self._accepted[kind] = way
            if way.writable and not writable:
                self._warn_once(
                    "maps no device memory read-only: peers' experts are mapped writable, though "
                    "nothing writes them",
                    refusals,
                )
            if way.piecewise:
                self._warn_once(
                    "sets no access over several allocations in one call: it gets one call for each",
                    refusals,
                )
            return
        memory = "its own and its peers' memory" if is_mixed else "device memory"
        raise DwdpMemoryError(
            f"this driver gives access to no range over {len(allocations)} allocations of {memory}, "
            f"neither in one call nor in one for each: {refusals[0]}"
        )

    def _set_access(self, address: int, allocations: Sequence[Allocation], way: Access) -> None:
        sizes = [each.num_bytes for each in allocations]
        for num_bytes in sizes if way.piecewise else [sum(sizes)]:
            self._device.set_access(address, num_bytes, writable=way.writable)
            address += num_bytes

    def _warn_once(self, what: str, refusals: Sequence[AccessRefusedError]) -> None:
        if refusals and what not in self._said:
            self._said.add(what)
            logger.warning("DWDP: the driver of this GPU %s (%s)", what, refusals[0])

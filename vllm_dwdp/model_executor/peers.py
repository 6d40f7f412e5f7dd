"""The peers' shards as this rank maps them. Checked before they are read; worker's main thread."""

from vllm_dwdp.device.base import Device, Handles, PeerMemory
from vllm_dwdp.distributed.published_shard import PublishedShard
from vllm_dwdp.errors import PeerMismatchError
from vllm_dwdp.layout.model import ModelLayout
from vllm_dwdp.model_executor.layout_facts import first_difference
from vllm_dwdp.model_executor.start_cost import StartCost


class PeerShards:
    """What is mapped of the other ranks; `close` unmaps it, and composites keep what they map.

    Args:
        device: maps them.
        layout: of all experts over the group.
        facts: of that layout, which every peer must have published.
        cost: counts the digests that are compared.
    """

    def __init__(self, device: Device, layout: ModelLayout, facts: bytes, cost: StartCost) -> None:
        self.mapped: dict[int, PeerMemory] = {}
        self._device = device
        self._layout = layout
        self._facts = facts
        self._cost = cost

    @property
    def num_handles(self) -> int:
        """Handles that the shards of the whole group are passed by."""
        return sum(len(self._handle_bytes(rank)) for rank in range(self._layout.group_size))

    def map_all(self, met: dict[int, PublishedShard]) -> None:
        """Map these shards, in place of earlier ones of the same ranks; takes over all handles.

        Raises:
            PeerMismatchError: one of them is not what this model's layout expects.
            DwdpMemoryError, TransferError: one cannot be mapped.
        """
        try:
            while met:
                rank, published = next(iter(met.items()))
                mapped = self._map(rank, published)
                del met[rank]
                if rank in self.mapped:
                    self.mapped[rank].close()
                self.mapped[rank] = mapped
                if published.is_lent:
                    self._check_lent(rank, published)
        finally:
            for published in met.values():
                published.close()

    def close(self) -> None:
        """Unmap every shard."""
        while self.mapped:
            self.mapped.popitem()[1].close()

    def _map(self, rank: int, published: PublishedShard) -> PeerMemory:
        """Map one shard; takes over its handles once it returns."""
        whose = f"the experts of rank {rank} of the group"
        if published.layout != self._facts:
            raise PeerMismatchError(other_layout(whose, self._facts, published.layout))
        expected = self._handle_bytes(rank)
        if published.handle_bytes != expected:
            raise PeerMismatchError(
                f"rank {rank} of the group published a shard of {sum(published.handle_bytes)} bytes "
                f"in {len(published.handle_bytes)} handles, but this model's layout gives it "
                f"{sum(expected)} in {len(expected)}. Start every rank with the same checkpoint, "
                "dtype and options."
            )
        return self._device.open_peer(handles_of(published))

    def _check_lent(self, rank: int, published: PublishedShard) -> None:
        """Check that what a survivor kept of a dead rank is what that rank published."""
        num_bytes = sum(published.handle_bytes)
        if self._cost.digest_of(self.mapped[rank], num_bytes) != published.digest:
            raise PeerMismatchError(
                f"the experts of rank {rank}, which is dead, are not what it published: the memory of "
                "a survivor that kept them has changed. Restart all ranks of the group."
            )

    def _handle_bytes(self, rank: int) -> tuple[int, ...]:
        return self._device.handle_bytes(self._layout.piece_bytes(rank))


def handles_of(published: PublishedShard) -> Handles:
    """Return the handles of a shard, as a device takes them; they stay the shard's until it has."""
    return Handles(
        fds=published.fds, fabric=published.fabric_handles, num_bytes=published.handle_bytes
    )


def other_layout(whose: str, ours: bytes, theirs: bytes) -> str:
    """Return the error text for experts that are laid out otherwise than ours."""
    return (
        f"{whose} are laid out for other kernels or parameters than this rank's "
        f"({first_difference(ours, theirs)}). Start every rank with the same arguments, the same VLLM_* "
        "environment and the same kind of device."
    )

"""A rank that comes back takes over its own experts: the memory of an earlier start, from a survivor.

Runs in the worker's main thread, before the model is loaded. Whatever cannot be used is given back, and
the rank loads from disk.
"""

from contextlib import ExitStack
from dataclasses import dataclass

from vllm_dwdp.device.base import Device, Shard
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.distributed.published_shard import PublishedShard
from vllm_dwdp.errors import DwdpMemoryError, TransferError
from vllm_dwdp.logger import init_logger
from vllm_dwdp.model_executor.peers import handles_of
from vllm_dwdp.model_executor.start_cost import StartCost

logger = init_logger(__name__)


@dataclass(frozen=True)
class Adopted:
    """The shard of an earlier start of this rank, taken over.

    Args:
        shard: its memory; the caller closes it.
        layout: identity of what lies in it.
        digest: of its content, which has been compared and cannot change any more.
    """

    shard: Shard
    layout: bytes
    digest: bytes


def adopt_shard(
    device: Device, membership: Membership, rank: int, cost: StartCost
) -> Adopted | None:
    """Take over this rank's shard of an earlier start from a survivor that has it intact, if any."""
    refused = False
    for kept in membership.recover():
        shard = _try_to_adopt(device, kept, rank, cost)
        if shard is not None:
            return Adopted(shard, kept.layout, kept.digest)
        refused = True
    if refused:
        logger.warning(
            "DWDP rank %d loads its experts from disk, because no peer has them intact. The peers hold "
            "the earlier copy as well until they restart",
            rank,
        )
    return None


def _try_to_adopt(device: Device, kept: PublishedShard, rank: int, cost: StartCost) -> Shard | None:
    """Return the memory behind `kept`, which is taken over, or None if it is not what was published."""
    with ExitStack() as undo:
        undo.callback(kept.close)
        try:
            adopted = device.adopt_shard(handles_of(kept))
        except (DwdpMemoryError, TransferError) as error:
            logger.warning(
                "DWDP rank %d cannot map the experts that a peer keeps for it: %s", rank, error
            )
            return None
        undo.pop_all()
        undo.callback(adopted.close)
        if cost.digest_of(adopted, sum(kept.handle_bytes)) == kept.digest:
            undo.pop_all()
            return adopted
    logger.warning(
        "DWDP rank %d: the experts that a peer kept for it have another digest than it published",
        rank,
    )
    return None

"""A rank that comes back takes over its own experts: the memory of its earlier life, from a survivor.

Runs in the worker's main thread, before the model is loaded. Whatever cannot be used is given back, and
the rank loads from disk.
"""

from contextlib import ExitStack

from vllm_dwdp.device.base import Device, Shard
from vllm_dwdp.distributed.membership import Membership, PublishedShard
from vllm_dwdp.errors import DwdpMemoryError, TransferError
from vllm_dwdp.logger import init_logger
from vllm_dwdp.model_executor.peers import handles_of

logger = init_logger(__name__)


def adopt_shard(device: Device, rendezvous: Membership, rank: int) -> tuple[Shard | None, bytes]:
    """This rank's shard of an earlier life and its layout, from a survivor that has it intact."""
    refused = False
    for kept in rendezvous.recover():
        adopted = _try_to_adopt(device, kept, rank)
        if adopted is not None:
            return adopted, kept.layout
        refused = True
    if refused:
        logger.warning(
            "DWDP rank %d loads its experts from disk; they are held twice until the peers restart",
            rank,
        )
    return None, b""


def _try_to_adopt(device: Device, kept: PublishedShard, rank: int) -> Shard | None:
    """The memory behind `kept`, which is taken over, or None if it is not what was published."""
    with ExitStack() as undo:
        undo.callback(kept.close)
        try:
            adopted = device.adopt_shard(handles_of(kept))
        except (DwdpMemoryError, TransferError) as error:
            logger.warning("DWDP rank %d cannot use its experts at a peer: %s", rank, error)
            return None
        undo.pop_all()
        undo.callback(adopted.close)
        if adopted.digest() == kept.digest:
            undo.pop_all()
            return adopted
    logger.warning(
        "DWDP rank %d: the experts that a peer kept for it are not what it published", rank
    )
    return None

"""A rank that comes back: which weights its peers serve by now, and what they have of earlier starts.

Peers are asked for the weights before the rank says what it is. They are asked for its shard once,
early, without handles; the handles of what they hold are fetched once, late, by the code that adopts it.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.dialling import REPLY_TIMEOUT_S, Dialler, ask_once
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.fingerprint import Fingerprint
from vllm_dwdp.distributed.group_state import ranks_after
from vllm_dwdp.distributed.published_shard import PublishedShard
from vllm_dwdp.errors import ProtocolError
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)


def renewed_weights(
    endpoint: Endpoint, *, group: int, dwdp_rank: int, group_size: int
) -> Fingerprint | None:
    """Return what the group serves, if it has read another checkpoint since it started; else None.

    Raises:
        SecretMismatchError: a peer has another secret.
        RendezvousError: what listens in a peer's place is not that rank.
    """
    for peer in ranks_after(dwdp_rank, group_size):
        with suppress(OSError, ProtocolError):
            reply = ask_once(endpoint, group, peer, messages.Renewed(), REPLY_TIMEOUT_S)
            if isinstance(reply, messages.Identity):
                return reply.fingerprint
    return None


@dataclass(frozen=True, kw_only=True)
class Return:
    """What the peers of a starting rank remember of it.

    Args:
        seen_generation: the newest start of this rank that a peer has seen, where that looks later
            than this one, because a clock was set back; else 0.
        num_bytes: of the shard of an earlier start that the lenders hold.
        lenders: peers, or a holder, that hold it whole.
    """

    seen_generation: int = 0
    num_bytes: int = 0
    lenders: tuple[int, ...] = ()

    @classmethod
    def ask(cls, dialler: Dialler) -> "Return":
        """Ask every peer and a holder; `dialler` is a later start than any that was seen from now on.

        Raises:
            PeerMismatchError: a peer serves another model, layout or version.
        """
        seen, num_bytes, lenders = 0, 0, []
        for peer in dialler.lenders:
            reply = dialler.ask(peer, dialler.dwdp_rank)
            if isinstance(reply, messages.Refused) and reply.seen_generation > dialler.generation:
                logger.warning(
                    "DWDP rank %d of group %d: the clock of this host was set back since an earlier "
                    "start of this rank, which therefore takes a later generation than the clock says. "
                    "Set the clock (NTP)",
                    dialler.dwdp_rank,
                    dialler.group,
                )
                seen = reply.seen_generation
                dialler.generation = seen + 1
                reply = dialler.ask(peer, dialler.dwdp_rank)
            dialler.raise_refusal(peer, reply)
            if isinstance(reply, messages.Shard):
                lenders.append(peer)
                num_bytes = num_bytes or sum(reply.handle_bytes)
        return cls(seen_generation=seen, num_bytes=num_bytes, lenders=tuple(lenders))

    def shards(self, dialler: Dialler) -> Iterator[PublishedShard]:
        """Fetch the shard from one lender after the other; the caller owns them.

        Raises:
            PeerMismatchError: a lender refuses us by now.
        """
        for lender in self.lenders:
            shard = dialler.fetch(lender, dialler.dwdp_rank)
            if shard is not None:
                yield shard

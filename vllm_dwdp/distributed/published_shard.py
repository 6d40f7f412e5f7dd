"""A shard as a rank publishes it, and what another rank knows of that rank."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from vllm_dwdp.distributed import messages
from vllm_dwdp.errors import RendezvousError


@dataclass(frozen=True, kw_only=True)
class PublishedShard:
    """The shard of a rank as it is handed over. The receiver owns `fds` and closes it.

    Args:
        rank: whose shard.
        generation: the start, or the update of weights, of that rank that published it.
        fds: read-only descriptors of its memory, in order.
        fabric_handles: CUDA fabric handles of its memory, in order.
        handle_bytes: bytes behind each handle, in order.
        layout: identity of what lies in the shards of the group.
        digest: of its content; empty until it is whole.
        ready: whether it is whole.
        direct_limit: the most tokens of a step that reads in place: what its rank proposes, or what the
            group runs with; None if the rank has no choice.
        limit_in_force: whether it is what the group runs with.
        update: number of the last update of the group's weights; 0 as they were loaded at first.
        is_lent: whether another rank handed it to us, which had it from that rank.
    """

    rank: int
    generation: int
    fds: tuple[int, ...]
    fabric_handles: tuple[bytes, ...]
    handle_bytes: tuple[int, ...]
    layout: bytes
    digest: bytes
    ready: bool
    direct_limit: int | None = None
    limit_in_force: bool = False
    update: int = 0
    is_lent: bool = False

    def close(self) -> None:
        """Close its descriptors; what is mapped stays."""
        messages.close_all(self.fds)

    def duplicate(self) -> "PublishedShard":
        """Make the same shard with descriptors of its own.

        Raises:
            RendezvousError: the limit of open files is reached.
        """
        return replace(self, fds=duplicates(self.fds))

    def packets(self, *, with_handles: bool) -> Iterator[messages.Packet]:
        """Encode the shard as messages. Keep it open until they are sent."""
        fds = self.fds if with_handles else ()
        fabric_handles = self.fabric_handles if with_handles else ()
        header = messages.Shard(
            self.rank,
            self.generation,
            self.handle_bytes,
            self.layout,
            self.digest,
            self.ready,
            len(fds),
            len(fabric_handles),
            self.direct_limit,
            self.limit_in_force,
            self.update,
        )
        return messages.shard_packets(header, fds, fabric_handles)


@dataclass(frozen=True)
class PeerState:
    """The state of a peer: `missing`, `published`, `ready` or `dead`."""

    state: str
    generation: int


def agreed_limit(shards: Iterable[PublishedShard]) -> int | None:
    """Return the `direct_limit` of these shards' ranks: that in force, else the least proposed.

    The least is the safe side, and it is the rank whose links are the most in demand. To count it once
    more changes nothing, so it does not matter which rank decides first. None if no rank proposes one.
    """
    known = [(each.direct_limit, each.limit_in_force) for each in shards]
    proposed = [limit for limit, _ in known if limit is not None]
    in_force = [limit for limit, decided in known if limit is not None and decided]
    return min(in_force or proposed, default=None)


def duplicates(fds: Sequence[int]) -> tuple[int, ...]:
    """Make descriptors of our own for the same files.

    Raises:
        RendezvousError: the limit of open files is reached; none is left open.
    """
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))
    except OSError as error:
        messages.close_all(made)
        raise RendezvousError(
            f"duplicating {len(fds)} descriptors of a shard failed after {len(made)}: {error}. "
            "Raise the limit of open files, e.g. with `ulimit -n 65536`."
        ) from error
    return tuple(made)


@contextmanager
def closed_on_error(shards: dict[int, PublishedShard]) -> Iterator[None]:
    """Close `shards` when the block fails."""
    try:
        yield
    except BaseException:
        for shard in shards.values():
            shard.close()
        raise

"""A group's shards held by a process that is none of its ranks, so that they outlive all these at once.

The holder has descriptors and nothing else: no mapping, no device, no vLLM, no torch. It answers like
a survivor, verifies nothing (a rank that takes a shard over compares its digest) and refuses a stale
process only: ranks that start with something new must be able to, so what cannot be theirs is given up
as soon as no rank runs with it. No rank waits for a holder.

`look` runs in one thread of the owner, answers in another; neither waits for the other.
"""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.connection import Connection
from vllm_dwdp.distributed.endpoint import HOLDER, Endpoint
from vllm_dwdp.distributed.held_shards import HeldShards
from vllm_dwdp.distributed.published_shard import PublishedShard
from vllm_dwdp.distributed.server import Server
from vllm_dwdp.errors import DwdpError, ProtocolError

LOOK_TIMEOUT_S = 1.0


class GroupHolder:
    """Holds the whole shards of one group from `open` until `close`.

    Args:
        endpoint: where the ranks meet.
        group: number of the group within the deployment.
        group_size: ranks of the group.
        make_room: called before files are opened, with their number and the purpose; may raise a
            DwdpError, and then they are not.
        shards: what is held; owned by `resources`.
        resources: everything that `close` closes.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        group: int,
        group_size: int,
        make_room: Callable[[int, str], None],
        shards: HeldShards,
        resources: ExitStack,
    ) -> None:
        self.group = group
        self._endpoint = endpoint
        self._group_size = group_size
        self._make_room = make_room
        self._shards = shards
        self._resources = resources
        self._passed_over: set[tuple[int, int]] = set()

    @classmethod
    def open(
        cls,
        endpoint: Endpoint,
        group: int,
        group_size: int,
        make_room: Callable[[int, str], None] = lambda num_files, purpose: None,
    ) -> "GroupHolder":
        """Listen, and answer in a daemon thread from now on.

        Raises:
            RendezvousError: the group has a holder already, or the endpoint cannot be used.
        """
        shards = HeldShards(group)
        with ExitStack() as undo:
            undo.callback(shards.close)
            server = Server(
                undo.enter_context(endpoint.listen(group, HOLDER)),
                lambda sock: endpoint.greet(sock, group, HOLDER),
                functools.partial(_answer, shards, group_size),
                lambda: None,
                f"holder of group {group}",
            )
            undo.callback(server.close)
            return cls(endpoint, group, group_size, make_room, shards, undo.pop_all())

    def close(self) -> None:
        """Give everything up; what ranks have mapped stays theirs. Idempotent."""
        self._resources.close()

    def look(self) -> list[str]:
        """Ask every rank once for what we do not have of it; what is news, one line each."""
        news = [line for rank in range(self._group_size) for line in self._ask(rank)]
        return news + self._shards.settle()

    def status(self) -> dict[str, Any]:
        """Return the answer to a status request, as JSON."""
        return self._shards.status() | {"group_size": self._group_size}

    def _ask(self, rank: int) -> list[str]:
        try:
            connection = self._endpoint.connect(self.group, rank, LOOK_TIMEOUT_S)
            if connection is None:
                self._shards.note_running(rank, runs=False)
                return []
            with connection:
                connection.send_message(messages.Keep(self._shards.generation(rank)))
                return self._hear(rank, connection)
        except (OSError, ProtocolError):
            return []  # it hangs, or died meanwhile; we look again
        except DwdpError as error:
            return [f"the holder of group {self.group} cannot hold rank {rank}'s experts: {error}"]

    def _hear(self, rank: int, connection: Connection) -> list[str]:
        reply, stray = connection.receive_reply()
        messages.close_all(stray)
        if not isinstance(reply, messages.Identity):
            self._shards.note_running(rank, runs=isinstance(reply, messages.Accepted))
            return []
        header, stray = connection.receive_reply()
        messages.close_all(stray)
        if not isinstance(header, messages.Shard) or header.dwdp_rank != rank:
            raise ProtocolError(f"rank {rank} sent {type(header).__name__}, not its shard")
        if not header.num_fds and any(header.handle_bytes):
            return self._pass_over(rank, header.generation)
        self._make_room(header.num_fds, f"holding the experts of rank {rank}")
        fds, _ = connection.receive_handles(header)
        shard = PublishedShard(
            rank=rank,
            generation=header.generation,
            fds=tuple(fds),
            fabric_handles=(),
            handle_bytes=header.handle_bytes,
            layout=header.layout,
            digest=header.digest,
            ready=header.ready,
            update=header.update,
            is_lent=True,
        )
        return self._shards.hold(shard, reply.fingerprint)

    def _pass_over(self, rank: int, generation: int) -> list[str]:
        """Report once a shard without descriptors, which are what keeps memory alive."""
        if (rank, generation) in self._passed_over:
            return []
        self._passed_over.add((rank, generation))
        return [
            f"the holder of group {self.group} cannot hold rank {rank}'s experts: this machine passes "
            "device memory by CUDA fabric handles only, which keep nothing alive"
        ]


def _answer(
    shards: HeldShards, group_size: int, request: messages.Request
) -> list[messages.Packet]:
    """Answer one request (in the server's thread)."""
    if isinstance(request, messages.StatusRequest):
        return [(messages.Status(shards.status() | {"group_size": group_size}), ())]
    if isinstance(request, messages.Borrow):
        return shards.lend(request)
    if isinstance(request, messages.Failed):
        return shards.doubt(request)
    return [(messages.NotYet(), ())]

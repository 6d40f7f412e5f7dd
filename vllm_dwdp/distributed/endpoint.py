"""Where the ranks of a group listen for each other.

No rank owns the endpoint: every rank listens for itself and dials the others, so any rank may die and
come back, also the first. `meeting` reads one from what the user wrote.
"""

import socket
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from vllm_dwdp.distributed.connection import Connection

BACKLOG = 128
HOLDER = -1
"""In place of a rank: a process that keeps a group's shards and is none of its ranks (`holder`)."""
LINGER_S = 3.0
"""How long a killed process may still seem to listen, while the kernel takes it apart."""


class Endpoint(ABC):
    """A parsed `rendezvous`: how ranks listen for and reach each other.

    Endpoints are values: they compare by content, and pickle into the processes of the ranks.
    """

    carries_fds: ClassVar[bool]
    """Whether descriptors can travel; else only CUDA fabric handles can."""

    @abstractmethod
    def listen(self, group: int, rank: int) -> socket.socket:
        """Listen as rank `rank` of group `group`; the socket does not block, and is the caller's.

        Closing it removes whatever it left for others to find.

        Raises:
            RendezvousError: a live process already is this rank, or the place cannot be used.
        """

    @abstractmethod
    def greet(self, sock: socket.socket, group: int, rank: int) -> Connection | None:
        """Return the connection over an accepted socket; None if we do not talk to its other end."""

    @abstractmethod
    def connect(self, group: int, rank: int, timeout_s: float) -> Connection | None:
        """Return a connection to that rank, or None if no process listens there (yet).

        Raises:
            RendezvousError: what listens there is not that rank.
        """

    @abstractmethod
    def listening(self, group: int, ranks: Iterable[int], timeout_s: float) -> set[int]:
        """Those of `ranks` at whose place a process listens; takes at most `timeout_s`."""

    @property
    def holders(self) -> tuple[int, ...]:
        """Who may hold shards beside the ranks: memory can be held where descriptors travel.

        A fabric handle is a number, which keeps nothing alive.
        """
        return (HOLDER,) if self.carries_fds else ()


def name_of(rank: int) -> str:
    """Name a rank, or the holder, in a sentence."""
    return "the holder" if rank == HOLDER else f"rank {rank}"

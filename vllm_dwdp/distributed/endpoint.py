"""Where the ranks of a group listen for each other.

::

    unix:///folder              a folder the ranks share; rank r of group g listens on g<g>-r<r>.sock
    abstract:<name>             Linux abstract socket names: nothing on the file system
    tcp://host[,host...]:port   several hosts of one NVLink domain; needs a shared secret

No rank owns the meeting place: every rank listens for itself and dials the others, so any rank may
die and come back, also the first.
"""

import socket
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from vllm_dwdp.config import DwdpLaunch
from vllm_dwdp.distributed.connection import Connection
from vllm_dwdp.errors import DwdpConfigError

BACKLOG = 128
LINGER_S = 3.0
"""How long a killed process may still seem to listen, while the kernel takes it apart."""


class Endpoint(ABC):
    """A parsed meeting place."""

    kind: ClassVar[str]
    carries_fds: ClassVar[bool]
    """Whether descriptors can travel; else only CUDA fabric handles can."""

    @staticmethod
    def parse(text: str, group_size: int = 1, secret_file: str | None = None) -> "Endpoint":
        """Read one of the three forms.

        Args:
            group_size: ranks of a group; `tcp://` spreads them over hosts and ports.
            secret_file: needed for `tcp://` only.

        Raises:
            DwdpConfigError: the text is none of them, or the secret is missing or unusable.
        """
        from vllm_dwdp.distributed.tcp import TcpEndpoint
        from vllm_dwdp.distributed.unix import AbstractEndpoint, UnixEndpoint

        if text.startswith("tcp://"):
            return TcpEndpoint.parse_hosts(text, group_size, secret_file)
        if secret_file is not None:
            raise DwdpConfigError(
                f"dwdp rendezvous_secret_file={secret_file!r} is used by tcp:// only; {text!r} is "
                "guarded by its folder and by the user id. Leave the secret out."
            )
        if text.startswith("unix://") and text.removeprefix("unix://").startswith("/"):
            return UnixEndpoint(text.removeprefix("unix://"))
        if text.startswith("abstract:") and text != "abstract:":
            return AbstractEndpoint(text.removeprefix("abstract:"))
        raise DwdpConfigError(
            f"dwdp rendezvous={text!r} is not a meeting place; use unix:///absolute/folder (shared "
            "by the ranks of one host)."
        )

    @staticmethod
    def of(launch: DwdpLaunch) -> "Endpoint":
        """The meeting place of a deployment; as `parse`."""
        config = launch.config
        return Endpoint.parse(launch.endpoint, config.group_size, config.rendezvous_secret_file)

    @abstractmethod
    def listen(self, group: int, rank: int) -> socket.socket:
        """A non-blocking listening socket for rank `rank` of group `group`, owned by the caller.

        Raises:
            RendezvousError: a live process already is this rank, or the place cannot be used.
        """

    @abstractmethod
    def greet(self, sock: socket.socket, group: int, rank: int) -> Connection | None:
        """The connection over a socket that our listener accepted; None if we do not talk to it."""

    @abstractmethod
    def connect(self, group: int, rank: int, timeout_s: float) -> Connection | None:
        """A connection to that rank, or None if nobody listens there (yet).

        Raises:
            RendezvousError: somebody listens there who is not that rank.
        """

    @abstractmethod
    def listening(self, group: int, ranks: Iterable[int], timeout_s: float) -> set[int]:
        """Those of `ranks` at whose place somebody listens; takes at most `timeout_s`."""

    def forget(self, group: int, rank: int) -> None:  # noqa: B027 - only folders remember
        """Remove what `listen` left behind; call while the socket still listens."""

    def forget_dead(self, group: int, rank: int) -> None:  # noqa: B027
        """As `forget`, for a rank that was killed; does nothing while somebody listens there."""

"""Where the ranks of a group listen for each other.

::

    unix:///folder      a folder the ranks share; rank r of group g listens on g<g>-r<r>.sock
    abstract:<name>     Linux abstract socket names: nothing on the file system, nothing to leak
    tcp://host:port     several hosts of one NVLink domain (needs CUDA fabric handles)

No rank owns the meeting place: every rank listens for itself and dials the others, so any rank may
die and come back, also the first.
"""

import errno
import os
import socket
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_dwdp.errors import DwdpConfigError, DwdpUnsupportedError, RendezvousError

BACKLOG = 128
LINGER_S = 3.0


@dataclass(frozen=True)
class Endpoint:
    """A parsed meeting place.

    Args:
        kind: `unix` or `abstract`.
        location: the folder, or the name.
    """

    kind: str
    location: str

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """Read `unix:///folder` or `abstract:<name>`.

        Raises:
            DwdpConfigError: the text is neither.
            DwdpUnsupportedError: it is `tcp://`, which only CUDA fabric handles could use.
        """
        if text.startswith("unix://") and text.removeprefix("unix://").startswith("/"):
            return cls("unix", text.removeprefix("unix://"))
        if text.startswith("abstract:") and text != "abstract:":
            return cls("abstract", text.removeprefix("abstract:"))
        if text.startswith("tcp://"):
            raise DwdpUnsupportedError(
                f"dwdp rendezvous={text!r}: ranks on several hosts need CUDA fabric memory handles, "
                "which this version does not pass. Use unix:///folder for the ranks of one host."
            )
        raise DwdpConfigError(
            f"dwdp rendezvous={text!r} is not a meeting place; use unix:///absolute/folder (shared "
            "by the ranks of one host)."
        )

    def __str__(self) -> str:
        return f"unix://{self.location}" if self.kind == "unix" else f"abstract:{self.location}"

    def listen(self, group: int, rank: int) -> socket.socket:
        """A listening socket for rank `rank` of group `group`, owned by the caller.

        Raises:
            RendezvousError: a live process already is this rank, or the folder cannot be used.
        """
        if self.kind == "unix":
            self._prepare_folder()
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._bind(server, group, rank)
            server.listen(BACKLOG)
            server.setblocking(False)
        except BaseException:
            server.close()
            raise
        return server

    def connect(self, group: int, rank: int, timeout_s: float) -> socket.socket | None:
        """A connection to that rank, or None if nobody listens there (yet)."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.settimeout(timeout_s)
        try:
            client.connect(self._address(group, rank))
        except (FileNotFoundError, ConnectionError, BlockingIOError, TimeoutError):
            client.close()
            return None
        return client

    def forget(self, group: int, rank: int) -> None:
        """Remove what `listen` left on the file system."""
        if self.kind == "unix":
            with suppress(OSError):
                Path(self._address(group, rank)).unlink()

    def forget_dead(self, group: int, rank: int) -> None:
        """As `forget`, unless a living process listens there.

        A killed process listens until the kernel has taken it apart, so this looks for a while.
        """
        deadline = time.monotonic() + LINGER_S
        while self.kind == "unix" and Path(self._address(group, rank)).exists():
            living = self.connect(group, rank, timeout_s=1.0)
            if living is None:
                self.forget(group, rank)
                return
            living.close()
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)

    def _address(self, group: int, rank: int) -> str:
        if self.kind == "abstract":
            return f"\0vllm-dwdp/{self.location}/g{group}-r{rank}"
        return f"{self.location}/g{group}-r{rank}.sock"

    def _bind(self, server: socket.socket, group: int, rank: int) -> None:
        address = self._address(group, rank)
        try:
            server.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise RendezvousError(
                    f"listening on {address!r} failed: {error}. Choose another dwdp rendezvous "
                    "folder (writable, short path, free space)."
                ) from error
            self._replace_stale(server, group, rank)

    def _replace_stale(self, server: socket.socket, group: int, rank: int) -> None:
        """Take over the socket file of a crashed predecessor; refuse if it lives."""
        living = self.connect(group, rank, timeout_s=1.0)
        if living is not None or self.kind == "abstract":
            if living is not None:
                living.close()
            raise RendezvousError(
                f"rank {rank} of group {group} is already running at {self}. Stop it, or give this "
                "deployment another dwdp rendezvous."
            )
        address = self._address(group, rank)
        scratch = f"{address}.{os.getpid()}"
        server.bind(scratch)
        os.replace(scratch, address)

    def _prepare_folder(self) -> None:
        folder = Path(self.location)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = folder.stat()
        except OSError as error:
            raise RendezvousError(
                f"the dwdp rendezvous folder {folder} cannot be made: {error}. Choose a writable "
                "folder."
            ) from error
        if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
            raise RendezvousError(
                f"the dwdp rendezvous folder {folder} belongs to uid {info.st_uid} with mode "
                f"{stat.S_IMODE(info.st_mode):04o}; it must belong to uid {os.geteuid()} with mode "
                f"0700, because whoever can enter it can join the group. Run chmod 700 {folder}, "
                "or choose another one."
            )

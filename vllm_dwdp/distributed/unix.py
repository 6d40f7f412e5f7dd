"""Meeting places of one host: Unix seqpacket sockets, in a folder or under abstract names.

Who may join is decided by the folder's mode and by the user id at the other end (SO_PEERCRED), whichever
end dialled. So containers with separate PID namespaces that share the folder can meet, and no other user
can take a rank's place under a name that is not a secret.
"""

import errno
import fcntl
import os
import socket
import stat
import struct
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_dwdp.distributed.connection import PacketConnection
from vllm_dwdp.distributed.endpoint import BACKLOG, HOLDER, LINGER_S, Endpoint, name_of
from vllm_dwdp.errors import ProtocolError, RendezvousError

LOCK_TIMEOUT_S = 10.0
POLL_S = 0.05
BACKLOG_POLL_S = 0.002
_NOBODY = (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR, errno.ECONNRESET)
_UCRED = struct.Struct("3i")


@dataclass(frozen=True)
class _LocalEndpoint(Endpoint):
    """An endpoint on one host: what both kinds share."""

    carries_fds = True

    location: str

    @abstractmethod
    def _address(self, group: int, rank: int) -> str:
        """Return the address to bind and to connect to."""

    def greet(self, sock: socket.socket, group: int, rank: int) -> PacketConnection | None:
        """Return a connection, if the other end runs as our user or as root."""
        return PacketConnection(sock) if _peer_uid(sock) in (os.geteuid(), 0) else None

    def connect(self, group: int, rank: int, timeout_s: float) -> PacketConnection | None:
        """As `Endpoint.connect`; a rank whose backlog is full is waited for.

        Raises:
            ProtocolError: another user listens there.
        """
        deadline = time.monotonic() + timeout_s
        client = _socket()
        client.settimeout(timeout_s)
        try:
            while (error := client.connect_ex(self._address(group, rank))) == errno.EAGAIN:
                if time.monotonic() > deadline:
                    break
                time.sleep(BACKLOG_POLL_S)
        except BaseException:
            client.close()
            raise
        if not error:
            self._refuse_other_users(client, group, rank)
            return PacketConnection(client, deadline)
        client.close()
        if error in _NOBODY or error == errno.EAGAIN:
            return None
        raise OSError(error, os.strerror(error), self._address(group, rank))

    def _refuse_other_users(self, client: socket.socket, group: int, rank: int) -> None:
        uid, trusted = _peer_uid(client), {os.geteuid(), 0, *self._owners()}
        if uid not in trusted:
            client.close()
            raise ProtocolError(
                f"user id {uid} listens as {name_of(rank)} of group {group} at {self}; ranks of user id "
                f"{os.geteuid()} trust only themselves and root. End that process, or choose another "
                "dwdp rendezvous."
            )

    def _owners(self) -> tuple[int, ...]:
        """Further user ids whose ranks these are."""
        return ()

    def listening(self, group: int, ranks: Iterable[int], timeout_s: float) -> set[int]:
        """As `Endpoint.listening`; a local connection is made or refused at once."""
        return {rank for rank in ranks if self._is_alive(group, rank)}

    def _is_alive(self, group: int, rank: int) -> bool:
        """Whether a process listens there, also where its backlog is full."""
        with _socket() as probe:
            probe.setblocking(False)
            return probe.connect_ex(self._address(group, rank)) in (0, errno.EAGAIN)

    def _already_running(self, group: int, rank: int) -> RendezvousError:
        return RendezvousError(
            f"{name_of(rank)} of group {group} is already running at {self}. Stop it, or give this "
            "deployment another dwdp rendezvous."
        )


class AbstractEndpoint(_LocalEndpoint):
    """Linux abstract socket names; they vanish with the process."""

    def __str__(self) -> str:
        return f"abstract:{self.location}"

    def _address(self, group: int, rank: int) -> str:
        return f"\0vllm-dwdp/{self.location}/{_place(group, rank)}"

    def listen(self, group: int, rank: int) -> socket.socket:
        """As `Endpoint.listen`."""
        server, deadline = _socket(), time.monotonic() + LINGER_S
        while True:
            try:
                server.bind(self._address(group, rank))
                return _listening(server)
            except OSError as error:
                if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                    time.sleep(POLL_S)
                    continue
                server.close()
                if error.errno == errno.EADDRINUSE:
                    raise self._already_running(group, rank) from None
                raise _cannot_listen(self._address(group, rank), error) from error


class UnixEndpoint(_LocalEndpoint):
    """A folder of mode 0700 with one socket file per rank."""

    def __str__(self) -> str:
        return f"unix://{self.location}"

    def _address(self, group: int, rank: int) -> str:
        return f"{self.location}/{_place(group, rank)}.sock"

    def _owners(self) -> tuple[int, ...]:
        """Return the folder's owner, whom root may ask for a status."""
        with suppress(OSError):
            return (os.stat(self.location).st_uid,)
        return ()

    def listen(self, group: int, rank: int) -> socket.socket:
        """As `Endpoint.listen`; takes the place of a dead predecessor's socket file.

        The socket listens before it gets its name, and only one process at a time changes names, so
        no process can mistake a living rank for a dead one.
        """
        self._prepare_folder()
        deadline = time.monotonic() + LINGER_S
        while True:
            try:
                with self._locked():
                    if not self._is_alive(group, rank):
                        return self._take_place(group, rank)
            except OSError as error:
                raise _cannot_listen(self._address(group, rank), error) from error
            if time.monotonic() > deadline:
                raise self._already_running(group, rank)
            time.sleep(POLL_S)

    def _take_place(self, group: int, rank: int) -> socket.socket:
        address = self._address(group, rank)
        scratch = f"{address}.new"
        with suppress(FileNotFoundError):
            os.unlink(scratch)
        server = _NamedSocket(address)
        try:
            server.bind(scratch)
            _listening(server)
            os.replace(scratch, address)
        except BaseException:
            os.close(server.detach())  # the name is not ours yet
            raise
        return server

    def forget_dead(self, group: int, rank: int) -> None:
        """Remove the name of a rank that was killed; does nothing while a process listens there.

        Waits a while for the kernel to take the killed process apart.
        """
        deadline = time.monotonic() + LINGER_S
        with suppress(OSError, RendezvousError):
            while time.monotonic() < deadline:
                with self._locked():
                    if not self._is_alive(group, rank):
                        os.unlink(self._address(group, rank))
                        return
                time.sleep(POLL_S)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Be alone in changing names in the folder; the kernel drops the lock of a killed process."""
        folder = os.open(self.location, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        try:
            while True:
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise RendezvousError(
                            f"another process has held the lock of the dwdp rendezvous folder "
                            f"{self.location} for {LOCK_TIMEOUT_S:.0f} s. End it, or choose "
                            "another folder."
                        ) from None
                    time.sleep(POLL_S)
            yield
        finally:
            os.close(folder)

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
        ours, mode = info.st_uid == os.geteuid(), stat.S_IMODE(info.st_mode)
        if ours and not mode & 0o077:
            return
        fix = f"Run chmod 700 {folder}" if ours else f"Start this rank as uid {info.st_uid}"
        raise RendezvousError(
            f"the dwdp rendezvous folder {folder} belongs to uid {info.st_uid} with mode {mode:04o}; "
            f"it must belong to uid {os.geteuid()} with mode 0700, because any user who can enter it "
            f"can join the group. {fix}, or choose another one."
        )


class _NamedSocket(socket.socket):
    """A listening socket whose name in a folder goes when it is closed.

    The name goes first: while the socket listens no process takes its place, so what is removed is ours.
    """

    def __init__(self, name: str) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._name = name

    def close(self) -> None:
        """Remove the name, then stop listening; idempotent."""
        if self.fileno() >= 0:
            with suppress(OSError):
                os.unlink(self._name)
        super().close()


def _place(group: int, rank: int) -> str:
    return f"g{group}-holder" if rank == HOLDER else f"g{group}-r{rank}"


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _peer_uid(sock: socket.socket) -> int:
    """User id of the process at the other end: the one that connected, or the one that listens."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(credentials)[1])


def _listening(server: socket.socket) -> socket.socket:
    server.listen(BACKLOG)
    server.setblocking(False)
    return server


def _cannot_listen(address: str, error: OSError) -> RendezvousError:
    return RendezvousError(
        f"listening on {address!r} failed: {error}. Choose another dwdp rendezvous folder "
        "(writable, short path, free space)."
    )

"""The meeting place of several hosts: TCP between ends that share a secret.

The rule of addresses: `tcp://host[,host...]:port` names the hosts of one group in the order of its
ranks, equally many on each; rank r of group g listens at its host on `port + g * group_size + r`,
bound to that one address. What travels are CUDA fabric handles; host memory cannot.
"""

import errno
import os
import selectors
import socket
import stat
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_dwdp.distributed.connection import SecureConnection
from vllm_dwdp.distributed.endpoint import BACKLOG, LINGER_S, Endpoint
from vllm_dwdp.errors import DwdpConfigError, ProtocolError, RendezvousError, SecretMismatchError

MIN_SECRET_BYTES = 16
MAX_SECRET_BYTES = 4096
MAX_PORT = 65535
POLL_S = 0.05
_WILDCARDS = ("", "*", "0.0.0.0", "::", "0")


@dataclass(frozen=True)
class TcpEndpoint(Endpoint):
    """Ports on named addresses of one or several hosts.

    Args:
        hosts: of one group, in the order of its ranks.
        port: of rank 0 of group 0.
        group_size: ranks of a group.
        secret: what every rank knows; it pickles with the endpoint, and is shown nowhere.
    """

    carries_fds = False

    hosts: tuple[str, ...]
    port: int
    group_size: int
    secret: bytes = field(repr=False)
    _reached: dict[tuple[int, int], tuple[int, tuple[str, int]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it was made from, not whom this process has reached."""
        return TcpEndpoint, (self.hosts, self.port, self.group_size, self.secret)

    def __str__(self) -> str:
        hosts = ",".join(f"[{host}]" if ":" in host else host for host in self.hosts)
        return f"tcp://{hosts}:{self.port}"

    @classmethod
    def parse(cls, text: str, group_size: int, secret_file: str | None) -> "TcpEndpoint":
        """Read `tcp://host[,host...]:port` and the secret.

        Raises:
            DwdpConfigError: it is malformed, or the secret is missing or unusable.
        """
        listed, _, port = text.removeprefix("tcp://").rpartition(":")
        hosts = tuple(host.removeprefix("[").removesuffix("]") for host in listed.split(","))
        if not port.isascii() or not port.isdigit() or not 0 < int(port) <= MAX_PORT:
            raise DwdpConfigError(
                f"dwdp rendezvous={text!r} is not a meeting place; use tcp://host:port, or "
                "tcp://host,host:port with the hosts in the order of the ranks."
            )
        if any(host in _WILDCARDS for host in hosts):
            raise DwdpConfigError(
                f"dwdp rendezvous={text!r} names every address of a host; ranks listen on one "
                "only. Name the address of the interface that the ranks shall use."
            )
        if group_size % len(hosts):
            raise DwdpConfigError(
                f"dwdp rendezvous={text!r} names {len(hosts)} hosts for groups of {group_size} "
                "ranks; each host must have equally many. Name a divisor of the group's size."
            )
        if secret_file is None:
            raise DwdpConfigError(
                f"dwdp rendezvous={text!r} needs rendezvous_secret_file: any process that reaches that "
                "port could join the group. Make one with `openssl rand -hex 32` and copy it to "
                "every host."
            )
        endpoint = cls(hosts, int(port), group_size, read_secret(Path(secret_file)))
        endpoint.address(0, group_size - 1)
        return endpoint

    def address(self, group: int, rank: int) -> tuple[str, int]:
        """Host and port of a rank.

        Raises:
            DwdpConfigError: there is no such port.
        """
        host = self.hosts[rank * len(self.hosts) // self.group_size]
        port = self.port + group * self.group_size + rank
        if port > MAX_PORT:
            raise DwdpConfigError(
                f"dwdp rendezvous={str(self)!r} gives rank {rank} of group {group} port {port}, and "
                f"{MAX_PORT} is the highest: rank r of group g listens on port + g * "
                f"{self.group_size} + r. Choose a lower port."
            )
        return host, port

    def listen(self, group: int, rank: int) -> socket.socket:
        """As `Endpoint.listen`."""
        deadline = time.monotonic() + LINGER_S
        while True:
            try:
                return self._listen(group, rank)
            except OSError as error:
                if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                    time.sleep(POLL_S)
                    continue
                raise self._cannot_listen(group, rank, error) from error

    def _listen(self, group: int, rank: int) -> socket.socket:
        family, address = self._resolve(group, rank)
        with ExitStack() as undo:
            server = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
            server.listen(BACKLOG)
            server.setblocking(False)
            undo.pop_all()
        return server

    def greet(self, sock: socket.socket, group: int, rank: int) -> SecureConnection:
        """Return a connection that first authenticates both ends."""
        connection = SecureConnection(sock, self.secret, _purpose(group, rank), listens=True)
        connection.flush()
        return connection

    def connect(self, group: int, rank: int, timeout_s: float) -> SecureConnection | None:
        """As `Endpoint.connect`; both ends are authenticated when it returns.

        Raises:
            SecretMismatchError: that rank has another secret.
            ProtocolError: what listens there is no rank.
        """
        host, port = self.address(group, rank)
        deadline = time.monotonic() + timeout_s
        try:
            client = socket.create_connection((host, port), timeout=timeout_s)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            return None
        self._reached[group, rank] = client.family, client.getpeername()[:2]
        connection = SecureConnection(
            client, self.secret, _purpose(group, rank), listens=False, deadline=deadline
        )
        try:
            connection.shake_hands()
        except (SecretMismatchError, ProtocolError) as error:
            connection.close()
            raise type(error)(
                f"rank {rank} of group {group} at {host}:{port}: {error}. dwdp "
                "rendezvous_secret_file must have the same content on every host."
            ) from error
        except OSError:
            connection.close()
            return None
        except BaseException:
            connection.close()
            raise
        return connection

    def listening(self, group: int, ranks: Iterable[int], timeout_s: float) -> set[int]:
        """As `Endpoint.listening`; all at once, since a host that is down takes the whole time.

        Ranks that were reached before are looked for at that address: a name server may take longer.
        """
        deadline = time.monotonic() + timeout_s
        alive: set[int] = set()
        with ExitStack() as opened:
            selector = opened.enter_context(selectors.DefaultSelector())
            for rank in ranks:
                try:
                    family, address = self._reached.get((group, rank)) or self._resolve(group, rank)
                except OSError:
                    continue
                probe = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
                probe.setblocking(False)
                if probe.connect_ex(address) in (0, errno.EINPROGRESS):
                    selector.register(probe, selectors.EVENT_WRITE, rank)
            while selector.get_map() and time.monotonic() < deadline:
                for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                    assert isinstance(key.fileobj, socket.socket)
                    selector.unregister(key.fileobj)
                    if key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                        alive.add(key.data)
        return alive

    def _resolve(self, group: int, rank: int) -> tuple[int, tuple[str, int]]:
        host, port = self.address(group, rank)
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return family, address[:2]  # type: ignore[return-value]  # (host, port) in both families

    def _cannot_listen(self, group: int, rank: int, error: OSError) -> RendezvousError:
        host, port = self.address(group, rank)
        if error.errno == errno.EADDRINUSE:
            return RendezvousError(
                f"rank {rank} of group {group} is already running at {host}:{port}, or another "
                "program uses that port. Stop it, or give this deployment another dwdp rendezvous."
            )
        return RendezvousError(
            f"rank {rank} of group {group} cannot listen at {host}:{port}: {error}. {host} must be "
            f"an address of the host that runs this rank; {self} gives the hosts in the order of "
            "the ranks."
        )


def read_secret(path: Path) -> bytes:
    """Return the content of a secret file, without a final line break.

    Raises:
        DwdpConfigError: it cannot be read, others can read it, or it is empty, short or huge.
    """
    advice = "Make one with `openssl rand -hex 32`, owned by the user of the ranks, mode 0600."
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(MAX_SECRET_BYTES + 1).rstrip(b"\r\n")
    except OSError as error:
        raise DwdpConfigError(
            f"dwdp rendezvous_secret_file={str(path)!r} cannot be read: {error}. {advice}"
        ) from error
    if mode & 0o027:
        raise DwdpConfigError(
            f"dwdp rendezvous_secret_file={str(path)!r} has mode {mode:04o}: others may read it or "
            f"its group may change it. Run chmod 600 {path}."
        )
    if not MIN_SECRET_BYTES <= len(content) <= MAX_SECRET_BYTES:
        seen = f"more than {MAX_SECRET_BYTES}" if len(content) > MAX_SECRET_BYTES else len(content)
        raise DwdpConfigError(
            f"dwdp rendezvous_secret_file={str(path)!r} holds {seen or 'no'} bytes; "
            f"{MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} are required. {advice}"
        )
    return content


def _purpose(group: int, rank: int) -> bytes:
    return f"rank {rank} of group {group}".encode()

"""Ports of this machine: free ones, and whether one is taken."""

import contextlib
import socket
from collections.abc import Collection

from vllm_dwdp.errors import DwdpConfigError


def free_ports(count: int, others: Collection[int | None] = ()) -> list[int]:
    """Return ports that were free a moment ago, and are none of the others."""
    sockets = [socket.socket() for _ in range(count + len(others))]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        found = [probe.getsockname()[1] for probe in sockets]
        return [port for port in found if port not in others][:count]
    finally:
        for probe in sockets:
            probe.close()


def free_ports_in_a_row(count: int, others: Collection[int | None] = ()) -> int:
    """Return the first of so many neighbouring ports that were free a moment ago.

    Raises:
        DwdpConfigError: there seem to be none.
    """
    for _ in range(100):
        (first,) = free_ports(1, others)
        row = range(first, first + count)
        with contextlib.suppress(OSError, OverflowError):
            for port in row:
                _try_to_listen("127.0.0.1", port)
            if not set(row) & set(others):
                return first
    raise DwdpConfigError(f"this machine has no {count} free ports in a row.")


def check_bindable(host: str, port: int, option: str = "--port") -> None:
    """Refuse an address that we could not listen at, before minutes go into starting ranks.

    Raises:
        DwdpConfigError: another program listens there, or the host is no address of this machine.
    """
    try:
        _try_to_listen(host, port)
    except OSError as error:
        raise DwdpConfigError(
            f"--host {host} {option} {port}: launch cannot listen there: {error}. Choose a port that "
            f"no other program uses (`ss -ltnp 'sport = :{port}'` names it), and a host that is an "
            "address of this machine."
        ) from error


def port_obstacle(rank: int, host: str, port: int) -> str:
    """What keeps a rank from listening at its port; empty if nothing does."""
    try:
        _try_to_listen(host, port)
    except OSError as error:
        return (
            f"rank {rank} cannot listen at port {port}: {error} (`ss -ltnp 'sport = :{port}'` names "
            "the program; another launch chooses other ports)"
        )
    return ""


def _try_to_listen(host: str, port: int) -> None:
    """Listen there for a moment, as servers do: what lingers of closed connections does not count.

    Raises:
        OSError: another program listens there, or the host is no address of this machine.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, _, _, address = found[0]
    with contextlib.closing(socket.socket(family, kind)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        probe.listen()

"""Ports of this machine: free ones, and whether one is taken."""

import contextlib
import functools
import random
import socket
from collections.abc import Collection, Sequence
from pathlib import Path

from vllm_dwdp.errors import DwdpConfigError

FIRST_PORT = 10_240
CONNECTING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""First and last port that the kernel gives to connections, and to who asks for any."""
DEFAULT_CONNECTING_PORTS = (32_768, 60_999)
FEW_PORTS = 1_000
MOST_TRIES = 10_000

_DICE = random.SystemRandom()  # two processes with one seed must not draw the same ports


def free_ports(count: int, others: Collection[int | None] = ()) -> list[int]:
    """Return ports that were free a moment ago, and are none of the others.

    They are none of those that the kernel gives to connections: one of these may be taken before its
    server listens, or while it is dead.

    Raises:
        DwdpConfigError: there seem to be none.
    """
    found: list[int] = []
    for _ in range(MOST_TRIES):
        if len(found) == count:
            return found
        port = _DICE.choice(_listening_ports())
        with contextlib.suppress(OSError):
            _try_to_listen("0.0.0.0", port)
            if port not in (*found, *others):
                found.append(port)
    raise DwdpConfigError(f"this machine has no {count} free ports.")


@functools.cache
def _listening_ports() -> Sequence[int]:
    """Return the ports that programs have to ask for; if they are few, all from `FIRST_PORT` on."""
    try:
        low, high = map(int, CONNECTING_PORTS.read_text().split())
    except (OSError, ValueError):
        low, high = DEFAULT_CONNECTING_PORTS
    found = [port for port in range(FIRST_PORT, 65536) if not low <= port <= high]
    return found if len(found) >= FEW_PORTS else range(FIRST_PORT, 65536)


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
    """Return what keeps a rank from listening at its port; empty if nothing does."""
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

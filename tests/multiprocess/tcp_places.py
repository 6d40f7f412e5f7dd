"""Ranks that meet over TCP: their places, secrets and fabric handles."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.entrypoints.launch.ports import free_ports


def secret_file(folder: Path, content: str = "0123456789abcdef") -> str:
    path = folder / f"secret-{len(list(folder.iterdir()))}"
    path.touch(mode=0o600)
    path.write_text(content + "\n")
    return str(path)


def base_port(size: int = 4) -> int:
    """Return a port that is free, as are those after it."""
    while True:
        (port,) = free_ports(1)
        probes = []
        try:
            for offset in range(size):
                probes.append(socket.create_server(("127.0.0.1", port + offset)))
            return port
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()


FABRIC = [number.to_bytes(64, "big") for number in range(3000)]


def publish(member: Membership, handles: list[bytes] = FABRIC) -> None:
    member.publish([], [2**40] * len(handles), handles)


def meet_all(members: list[Membership]) -> list[dict[int, tuple[bytes, ...]]]:
    """All meet and become ready; the handles that each got, by rank."""
    with ThreadPoolExecutor(len(members)) as pool:
        met = list(pool.map(lambda member: member.meet(), members))
        for member in members:
            member.announce_ready(b"digest")
        list(pool.map(lambda member: member.wait_ready(), members))
    return [{rank: shard.fabric_handles for rank, shard in shards.items()} for shards in met]

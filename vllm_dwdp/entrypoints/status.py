"""The ranks that meet somewhere, as they describe themselves."""

import re
from pathlib import Path
from typing import Any

from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.rendezvous import query_status
from vllm_dwdp.distributed.tcp import TcpEndpoint
from vllm_dwdp.distributed.unix import UnixEndpoint
from vllm_dwdp.errors import DwdpConfigError, RendezvousError

_SOCKET = re.compile(r"g(\d+)-r(\d+)\.sock")


def find_ranks(
    rendezvous: str, *, secret_file: str | None, group_size: int, num_groups: int
) -> list[dict[str, Any]]:
    """Each rank's status, in order of group and rank; `state` is serving, starting or dead.

    Args:
        rendezvous: where they meet.
        secret_file: for `tcp://`.
        group_size: ranks of a group; for `tcp://`, where nobody lists them.
        num_groups: as `group_size`.

    Raises:
        DwdpConfigError: nobody can be found there, or the secret cannot be used.
    """
    endpoint = Endpoint.parse(rendezvous, group_size, secret_file)
    if isinstance(endpoint, UnixEndpoint):
        places = _listed(Path(endpoint.location))
    elif isinstance(endpoint, TcpEndpoint):
        places = [(group, rank) for group in range(num_groups) for rank in range(group_size)]
    else:
        raise DwdpConfigError(
            f"{rendezvous!r} cannot be listed: ranks started together meet under a name that only "
            "they know; their figures are on /metrics of the server. Give unix:///folder."
        )
    return [_ask(endpoint, group, rank) for group, rank in sorted(places)]


def _listed(folder: Path) -> list[tuple[int, int]]:
    """Group and rank of every socket in the folder."""
    matches = [_SOCKET.fullmatch(path.name) for path in folder.glob("g*-r*.sock")]
    return [(int(match[1]), int(match[2])) for match in matches if match is not None]


def _ask(endpoint: Endpoint, group: int, rank: int) -> dict[str, Any]:
    place: dict[str, Any] = {"group": group, "dwdp_rank": rank}
    try:
        return query_status(endpoint, group, rank, timeout_s=2.0) | place
    except (RendezvousError, OSError) as error:
        return place | {"state": "dead", "last_failure": str(error)}

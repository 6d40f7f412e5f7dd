"""The ranks that meet somewhere, as they describe themselves."""

import re
from pathlib import Path
from typing import Any

from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.status import query_status
from vllm_dwdp.distributed.tcp import TcpEndpoint
from vllm_dwdp.distributed.unix import UnixEndpoint
from vllm_dwdp.errors import (
    DwdpConfigError,
    ProtocolError,
    RendezvousError,
    SecretMismatchError,
)

ANSWER_TIMEOUT_S = 2.0

_SOCKET = re.compile(r"g(\d+)-r(\d+)\.sock")


def find_ranks(
    rendezvous: str, *, secret_file: str | None, group_size: int, num_groups: int
) -> list[dict[str, Any]]:
    """Each rank's status, in order of group and rank.

    `state` is serving, starting, not answering (somebody listens in its place) or dead.

    Args:
        rendezvous: where they meet.
        secret_file: for `tcp://`.
        group_size: ranks of a group; for `tcp://`, where nobody lists them.
        num_groups: as `group_size`.

    Raises:
        DwdpConfigError: nobody can be found there, or the secret cannot be used.
    """
    endpoint = parse_endpoint(rendezvous, group_size, secret_file)
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
        return query_status(endpoint, group, rank, timeout_s=ANSWER_TIMEOUT_S) | place
    except (RendezvousError, OSError) as error:
        if rank not in endpoint.listening(group, (rank,), ANSWER_TIMEOUT_S):
            return place | {"state": "dead", "last_failure": str(error)}
        explained = isinstance(error, (ProtocolError, SecretMismatchError))
        silent = f"listens at {endpoint}, and did not say how it is in {ANSWER_TIMEOUT_S:g} s"
        failure = str(error) if explained else silent
        return place | {"state": "not answering", "last_failure": failure}


def needs_attention(ranks: list[dict[str, Any]]) -> bool:
    """Whether nobody is there, a rank is dead or silent, or one that answers has lost a peer.

    A dead rank's socket may have been tidied away: then only its peers know of it.
    """
    states = [entry["state"] for entry in ranks]
    states += [state for entry in ranks for state in entry.get("peers", {}).values()]
    return not ranks or not {"dead", "not answering"}.isdisjoint(states)

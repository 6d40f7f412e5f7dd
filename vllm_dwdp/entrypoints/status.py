"""The ranks that meet in a folder, as they describe themselves."""

import re
from pathlib import Path
from typing import Any

from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.rendezvous import query_status
from vllm_dwdp.errors import DwdpConfigError, RendezvousError

_SOCKET = re.compile(r"g(\d+)-r(\d+)\.sock")


def find_ranks(rendezvous: str) -> list[dict[str, Any]]:
    """Each rank's status, in order of group and rank; `state` is serving, starting or dead.

    Raises:
        DwdpConfigError: the place has no folder, so that nobody can be found there.
    """
    endpoint = Endpoint.parse(rendezvous)
    if endpoint.kind != "unix":
        raise DwdpConfigError(
            f"{rendezvous!r} cannot be listed: ranks started together meet under a name that only "
            "they know; their figures are on /metrics of the server. Give unix:///folder."
        )
    ranks = []
    for path in Path(endpoint.location).glob("g*-r*.sock"):
        match = _SOCKET.fullmatch(path.name)
        if match is not None:
            ranks.append(_ask(endpoint, int(match[1]), int(match[2])))
    return sorted(ranks, key=lambda entry: (entry["group"], entry["dwdp_rank"]))


def _ask(endpoint: Endpoint, group: int, rank: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"group": group, "dwdp_rank": rank}
    try:
        answer = query_status(endpoint, group, rank, timeout_s=2.0)
    except (RendezvousError, OSError):
        return entry | {"state": "dead"}
    return answer | entry | {"state": answer.get("state", "serving")}

"""A warning where ranks compute on the same cores: none can see the others before they have met."""

import contextlib
import os
from typing import Any

from vllm_dwdp.distributed.launch import BIND_ENV, Seat
from vllm_dwdp.distributed.status import query_status
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.logger import init_logger
from vllm_dwdp.model_executor.group import ExpertGroup

logger = init_logger(__name__)

TIMEOUT_S = 2.0


def announce_cores(group: ExpertGroup, cores: set[int]) -> None:
    """Put this rank's cores into its status, and warn of ranks that say the same ones."""

    def status() -> dict[str, Any]:
        return group.status() | {"cores": sorted(cores)}

    group.membership.describe_by(status)
    if os.environ.get(BIND_ENV) == "nobind":
        return
    for other, theirs in cores_of_others(group.seat).items():
        if common := sorted(cores & theirs):
            logger.warning(
                "DWDP ranks %s and %s both compute on cores %s and slow each other down. Give each rank "
                "cores of its own (taskset, a container's cpuset, %s), or use fewer ranks",
                group.seat.name,
                other.name,
                common,
                BIND_ENV,
            )


def cores_of_others(seat: Seat) -> dict[Seat, set[int]]:
    """Return the cores of each worker of this deployment that tells; one that comes later asks us."""
    found = {}
    for other in seat.launch.all_seats:
        if other == seat:
            continue
        with contextlib.suppress(OSError, DwdpError):
            status = query_status(seat.launch.endpoint, other.group, other.dwdp_rank, TIMEOUT_S)
            found[other] = set(status.get("cores", ()))
    return found

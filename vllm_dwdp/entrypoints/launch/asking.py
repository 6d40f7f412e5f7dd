"""What `launch` asks ranks where they meet: what one does that starts, and whether one may start."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.launch import place_in_group
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.status import query_status
from vllm_dwdp.errors import DwdpError

STATUS_TIMEOUT_S = 2.0


def rank_progress(config: DwdpConfig, rank: int, num_workers: int = 1) -> Callable[[], str]:
    """Make the question what a starting rank does, which is put to it where the ranks meet.

    The answer is empty until the rank loads its experts, and always if it shares none. Of several
    workers the first that still starts is quoted.

    Raises:
        DwdpConfigError: the rendezvous is no meeting place, or its secret cannot be used.
    """
    question = _question(config)

    def ask() -> str:
        said = ""
        for group, dwdp_rank in _workers(config, rank, num_workers):
            for status in question(group, [dwdp_rank]):
                if "doing" in status:
                    return str(status["doing"])
                said = "has its experts and warms up"
        return said

    return ask


def join_obstacle(config: DwdpConfig, rank: int, num_workers: int = 1) -> Callable[[], str]:
    """Make the question what would keep a rank from joining its group, whatever it loads.

    The ranks of the group that live are asked. The answer is empty if nothing would, or none lives.

    Raises:
        DwdpConfigError: as `rank_progress`.
    """
    question = _question(config)

    def ask() -> str:
        for group, dwdp_rank in _workers(config, rank, num_workers):
            peers = [peer for peer in range(config.group_size) if peer != dwdp_rank]
            for status in question(group, peers):
                if why := _why_none_joins(status):
                    return f"rank {rank} cannot join its group: {why}"
        return ""

    return ask


def _why_none_joins(status: dict[str, Any]) -> str:
    """Return why the group of a rank that says this takes no other; empty if it may."""
    if status["state"] == "refusing":
        return str(status["last_failure"])
    if status.get("weight_update") and status["weights"]["checkpoint"] is None:
        return (
            f"a trainer has sent its weights (update {status['weight_update']}), which no start can "
            "read. Restart all ranks, and send them again"
        )
    return ""


def _workers(config: DwdpConfig, rank: int, num_workers: int) -> list[tuple[int, int]]:
    """Return the group and the position in it of each worker of a rank."""
    return [
        place_in_group(rank, config.group_size, tensor_rank, num_workers)
        for tensor_rank in range(num_workers)
    ]


def _question(config: DwdpConfig) -> Callable[[int, list[int]], Iterator[dict[str, Any]]]:
    """Make the question for the status of some ranks of a group; who does not answer is left out."""
    if not config.shares_experts or config.rendezvous is None:
        return lambda group, ranks: iter(())
    place = parse_endpoint(config.rendezvous, config.group_size, config.rendezvous_secret_file)

    def ask(group: int, ranks: list[int]) -> Iterator[dict[str, Any]]:
        for each in ranks:
            with contextlib.suppress(OSError, DwdpError):
                yield query_status(place, group, each, timeout_s=STATUS_TIMEOUT_S)

    return ask

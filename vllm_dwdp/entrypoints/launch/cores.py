"""Which cores each server of a launch computes on: all ranks divide those that launch may use."""

from collections.abc import Mapping

from vllm_dwdp.distributed.launch import BIND_ENV, SHARED_CORES_ENV
from vllm_dwdp.errors import DwdpConfigError


def cores_for_each(
    num_ranks: int, environment: Mapping[str, str], num_decode: int = 0
) -> list[dict[str, str]]:
    """Return what to add to the environment of each rank, and then of each decode server.

    Ranks divide the cores by themselves once they are told to; where the user names some for each rank,
    as for one `vllm serve` of several ranks, each gets its own.

    Raises:
        DwdpConfigError: the user names cores for another number of ranks.
    """
    shared = {SHARED_CORES_ENV: "1"}
    named = environment.get(BIND_ENV, "auto")
    num_servers = num_ranks + num_decode
    if named in ("auto", "nobind") or num_servers == 1:
        return [shared] * num_servers
    lists = named.split("|")
    if len(lists) != num_servers:
        beside = f" and --decode-servers {num_decode}" if num_decode else ""
        raise DwdpConfigError(
            f"{BIND_ENV}={named!r} names cores for {len(lists)} ranks, and --ranks is {num_ranks}"
            f"{beside}. Give one list for each rank, with | between them, or leave it out: then they "
            "divide all cores."
        )
    return [shared | {BIND_ENV: cores} for cores in lists]

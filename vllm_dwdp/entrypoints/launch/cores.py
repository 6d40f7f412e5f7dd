"""Which cores each server of a launch computes on.

Ranks alone divide those that launch may use by themselves. A stock decode server would take all of
them, and each of its steps would wait for the thread on the slowest one: so launch divides the
cores over ranks and decode servers alike.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from vllm_dwdp.distributed.launch import BIND_ENV, SHARED_CORES_ENV
from vllm_dwdp.errors import DwdpConfigError

TOPOLOGY = Path("/sys/devices/system/cpu")


def cores_for_each(
    num_ranks: int,
    environment: Mapping[str, str],
    decode_workers: Sequence[int] = (),
    cores: Sequence[int] = (),
    workers_of_a_rank: int = 1,
) -> list[dict[str, str]]:
    """Return what to add to the environment of each rank, and then of each decode server.

    Where the user names cores for each server, as for one `vllm serve` of several ranks, each gets its
    own.

    Args:
        num_ranks: of the launch.
        environment: the user's.
        decode_workers: processes that compute, of each decode server.
        cores: to divide, in order; empty where GPUs compute.
        workers_of_a_rank: its tensor-parallel size.

    Raises:
        DwdpConfigError: the user names cores for another number of servers.
    """
    shared = {SHARED_CORES_ENV: "1"}
    named = environment.get(BIND_ENV, "auto")
    of_each = [workers_of_a_rank] * num_ranks + list(decode_workers)
    num_servers = len(of_each)
    if named == "auto" and decode_workers and cores:
        return [shared | bound for bound in _divided(of_each, num_ranks, cores)]
    if named in ("auto", "nobind") or num_servers == 1:
        return [shared] * num_servers
    lists, of_ranks = named.split("|"), num_ranks * workers_of_a_rank
    if len(lists) != of_ranks + len(decode_workers):
        beside = f" and --decode-servers {len(decode_workers)}" if decode_workers else ""
        several = f"each of the {workers_of_a_rank} workers of each rank"
        each = "each rank" if workers_of_a_rank == 1 else several
        raise DwdpConfigError(
            f"{BIND_ENV}={named!r} names cores for {len(lists)} ranks, and --ranks is {num_ranks}"
            f"{beside}. Give one list for {each}, with | between them, or leave it out: then they "
            "divide all cores."
        )
    starts = range(0, of_ranks, workers_of_a_rank)
    of_servers = ["|".join(lists[start : start + workers_of_a_rank]) for start in starts]
    return [shared | {BIND_ENV: cores} for cores in (*of_servers, *lists[of_ranks:])]


def _divided(of_each: Sequence[int], num_ranks: int, cores: Sequence[int]) -> list[dict[str, str]]:
    """Give every process that computes as many cores as any other, at least one.

    Where there are fewer cores than processes, the ranks divide them all, and decode servers compute on
    the last ones.
    """
    total = sum(of_each)
    if len(cores) >= total:
        edges = [len(cores) * number // total for number in range(total + 1)]
        shares = [cores[first:last] for first, last in pairwise(edges)]
    else:
        shares = [[cores[(number - total) % len(cores)]] for number in range(total)]
    bound, first = [], 0
    for count in of_each:
        lists = [",".join(map(str, share)) for share in shares[first : first + count]]
        bound.append({BIND_ENV: "|".join(lists)})
        first += count
    if len(cores) < total:
        bound[:num_ranks] = [{}] * num_ranks
    return bound


def physical_cores() -> list[int]:
    """One logical CPU of each physical core that this process may use, memory node by memory node."""
    first_of_core: dict[str, tuple[str, int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        folder = TOPOLOGY / f"cpu{cpu}"
        siblings = folder / "topology" / "thread_siblings_list"
        core = siblings.read_text().strip() if siblings.exists() else str(cpu)
        node = next((path.name for path in folder.glob("node*")), "")
        first_of_core.setdefault(core, (node, cpu))
    return [cpu for _, cpu in sorted(first_of_core.values())]

"""Which ranks a front end starts, where they meet, and which of them an offline `LLM` knows of."""

import atexit
import os
from dataclasses import dataclass
from typing import Any

from vllm_dwdp.compat.frontend.ray_ranks import RAY
from vllm_dwdp.compat.frontend.refusals import refuse_several_hosts_on_cpu
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.device.limits import is_confined
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.launch import SHARED_CORES_ENV, DwdpLaunch, RankSpan, Seat
from vllm_dwdp.distributed.meeting import make_abstract_endpoint, parse_endpoint
from vllm_dwdp.distributed.unix import UnixEndpoint
from vllm_dwdp.errors import DwdpConfigError

ENDPOINT_ENV = "DWDP_ENDPOINT"
"""Set by the process that starts the engines, read by the API servers that it spawns."""


@dataclass(frozen=True, kw_only=True)
class StartedRanks:
    """The ranks that a front end starts, and how it is started itself.

    Args:
        span: its ranks among all of the deployment.
        one_by_one: whether other ranks are started by another process.
        spmd_name: a name common to the processes of vLLM's SPMD offline style, else None.
    """

    span: RankSpan
    one_by_one: bool
    spmd_name: str | None = None


def find_ranks(args: Any, vllm_config: Any, size: int, *, headless: bool) -> StartedRanks:
    """Read the ranks of this front end off the config that vLLM made."""
    from vllm import envs

    parallel = vllm_config.parallel_config
    first = parallel.data_parallel_rank
    if args.data_parallel_size == 1 and parallel.data_parallel_size > 1:
        return StartedRanks(
            span=RankSpan(first, 1, size),
            one_by_one=True,
            spmd_name=f"spmd-{envs.VLLM_DP_MASTER_IP}-{envs.VLLM_DP_MASTER_PORT}",
        )
    starts_all = parallel.data_parallel_size == 1 or parallel.data_parallel_backend == RAY
    count = size if starts_all else parallel.data_parallel_size_local
    span = RankSpan(first, count, size, own_cores=_has_own_cores(count, size))
    return StartedRanks(span=span, one_by_one=headless or count < size)


def _has_own_cores(count: int, size: int) -> bool:
    """Whether the cores of this front end are for its ranks only: it is kept off the others.

    A process that starts several front ends of a deployment on the same cores sets `SHARED_CORES_ENV`.
    """
    return count < size and is_confined() and SHARED_CORES_ENV not in os.environ


def uncouple(parallel: Any, started: StartedRanks) -> None:
    """Let an offline `LLM` know of the ranks that it drives only, in its `parallel_config`.

    vLLM's offline client would wait for a wave of all ranks to end. A rank keeps its index.
    """
    from vllm import envs

    count = started.span.count
    if started.spmd_name is not None:
        parallel.data_parallel_size = parallel.data_parallel_size_local = 1
        if not envs.VLLM_ENABLE_V1_MULTIPROCESSING:  # the engine in this process reads it as well
            parallel.data_parallel_rank = 0
    elif parallel.data_parallel_size == 1 and count > 1:  # one LLM of several ranks
        parallel.data_parallel_size = parallel.data_parallel_size_local = count
        parallel.data_parallel_rank_local = None


def choose_endpoint(args: Any, config: DwdpConfig, started: StartedRanks) -> Endpoint:
    """Read the given rendezvous, take the endpoint that our parent made, or make a new one.

    Raises:
        DwdpConfigError: the rendezvous is none, or is missing where ranks are started one by one.
        DwdpUnsupportedError: it spans hosts, and the ranks compute on CPUs.
    """
    if config.rendezvous is not None:
        refuse_several_hosts_on_cpu(config.rendezvous)
        return parse_endpoint(config.rendezvous, config.group_size, config.rendezvous_secret_file)
    if started.spmd_name is not None:
        return parse_endpoint(f"abstract:{started.spmd_name}")
    if started.one_by_one and config.shares_experts:
        raise DwdpConfigError(
            "dwdp rendezvous is missing: ranks that are started one by one "
            "(--data-parallel-rank, --data-parallel-start-rank, --headless, "
            "--data-parallel-multi-port-external-lb) must be told where to meet. Give every rank the "
            "same folder, e.g. "
            '--additional-config \'{"dwdp": {"rendezvous": "unix:///run/user/1000/dwdp"}}\'.'
        )
    spawned_by_us = args._api_process_count > 1 and args._api_process_rank >= 0
    if spawned_by_us and ENDPOINT_ENV in os.environ:
        return parse_endpoint(os.environ[ENDPOINT_ENV])
    made = make_abstract_endpoint()
    os.environ[ENDPOINT_ENV] = str(made)
    return made


def forget_ranks_at_exit(launch: DwdpLaunch) -> None:
    """Remove the names of our ranks at exit: vLLM stops its workers with SIGKILL."""
    if isinstance(launch.endpoint, UnixEndpoint):
        atexit.register(_forget_ranks, launch.endpoint, launch.seats)


def _forget_ranks(endpoint: UnixEndpoint, seats: tuple[Seat, ...]) -> None:
    for seat in seats:
        endpoint.forget_dead(seat.group, seat.dwdp_rank)

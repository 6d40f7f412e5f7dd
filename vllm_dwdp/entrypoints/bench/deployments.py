"""What `vllm-dwdp bench` and `benchmarks/benchmark_serving.py` compare: DWDP and what else there is.

::

    dwdp       ranks that share one copy of the experts (dwdp mode "auto")
    prefetch   the same, copied layer by layer into slots
    replica    the same ranks with a full copy each (dwdp mode "replica")
    stock      a stock server per rank
    tp         one stock server, --tensor-parallel-size RANKS
    dp-ep      one stock server, --data-parallel-size RANKS --enable-expert-parallel; GPUs only
    disagg     vllm-dwdp launch: RANKS prefill, stock servers beside them decode

On the CPU every rank owns cores, and everything of a rank runs on them: its engine, its API server and
the client that drives it. So what a rank measures is its own. (The servers of `disagg` divide the cores
as `launch` does.)

A client that knows one URL only meets servers of one rank each behind vllm-router (`Setting.one_url`).
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

from vllm_dwdp.entrypoints.launch.disaggregation import devices_of
from vllm_dwdp.entrypoints.launch.server import Server, ServerError
from vllm_dwdp.errors import DwdpConfigError, DwdpError

T = TypeVar("T")
DWDP, DISAGGREGATED = "dwdp", "disagg"
BASELINES = ("replica", "tp", "stock", "prefetch", "dp-ep", DISAGGREGATED)
DEFAULT_BASELINES = ("replica", "tp")
ONE_SERVER = ("tp", "dp-ep")
_GPU_ONLY = "dp-ep"
SETTLE_S = 2.0
"""A router that was suspended takes its servers for dead until it has asked them again."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Ready servers.

    Args:
        name: as in the list above.
        servers: one, or one per rank.
        router: in front of several, for clients that know one URL.
        num_devices: that it may use: GPUs, or cores.
        start_s: from the start of its processes to the first answer of all.
    """

    name: str
    servers: tuple[Server, ...]
    router: Server | None = None
    num_devices: int
    start_s: float = field(compare=False)

    def url(self, rank: int = 0) -> str:
        """Say where the traffic of `rank` goes."""
        entrance = self.router or self.servers[rank % len(self.servers)]
        return entrance.url

    @property
    def everything(self) -> tuple[Server, ...]:
        """All servers, and the router."""
        return (*self.servers, *filter(None, [self.router]))

    @property
    def commands(self) -> list[list[str]]:
        """The command of each."""
        return [server.command for server in self.everything]

    def memory_bytes(self) -> int:
        """Sum the proportional set size of all its processes: shared pages count once."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    def processes(self) -> list[psutil.Process]:
        """List the processes of all its servers."""
        return [
            process
            for server in self.everything
            for process in (psutil.Process(server.process.pid), *server.processes())
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let its servers run only meanwhile (SIGCONT, SIGSTOP)."""
        for server in self.everything:
            server.resume()
        try:
            self._wait_for_routers()
            yield
        finally:
            for server in reversed(self.everything):
                server.suspend()

    def _wait_for_routers(self) -> None:
        """Return once what stands between a client and a server believes in it again.

        Raises:
            DwdpError: something has ended.
        """
        if self.router is None and self.name != DISAGGREGATED:
            return
        time.sleep(SETTLE_S)
        try:
            for server in self.everything:
                server.wait_until_ready()
        except ServerError as error:
            raise DwdpError(f"{self.name} does not answer any more: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every deployment serves, and on what.

    Args:
        model: a folder or a name, as for `vllm serve`.
        num_ranks: of every deployment.
        arguments: further arguments of every `vllm serve`.
        folder: for logs and sockets.
        one_url: whether all traffic of a deployment goes to one URL.
        decode_servers: of `disagg`, beside its ranks.
        decode_arguments: of these servers only.
    """

    model: str
    num_ranks: int
    arguments: tuple[str, ...]
    folder: Path
    one_url: bool = False
    decode_servers: int = 1
    decode_arguments: tuple[str, ...] = ()

    def num_devices(self, name: str) -> int:
        """Count the GPUs of a deployment; on the CPU every one has all cores that we may use."""
        if not has_gpu():
            return len(self.all_cores)
        more = self.decode_servers * devices_of(self.decode_arguments)
        return self.num_ranks + (more if name == DISAGGREGATED else 0)

    @property
    def all_cores(self) -> list[int]:
        """Those that we may use."""
        return sorted(os.sched_getaffinity(0))

    def cores(self, rank: int) -> list[int]:
        """Choose the cores of a rank: an even share of ours, or all if they are fewer than the ranks."""
        ours = self.all_cores
        first, last = (len(ours) * edge // self.num_ranks for edge in (rank, rank + 1))
        return ours[first:last] or ours


def has_gpu() -> bool:
    """Say whether an NVIDIA driver answers on this machine."""
    return Path("/proc/driver/nvidia/version").exists()


def in_turn(deployments: Sequence[T], number: int) -> Sequence[T]:
    """Order the deployments of a round: every second round the other way round."""
    return deployments if number % 2 else deployments[::-1]


def check_deployments(
    option: str, names: Sequence[str], known: Sequence[str], num_ranks: int
) -> None:
    """Refuse what this machine cannot run.

    Args:
        option: that names them, for the message.

    Raises:
        DwdpConfigError: an unknown deployment, one that needs a GPU, or fewer cores than ranks.
    """
    for name in names:
        if name not in known:
            raise DwdpConfigError(f"{option} {name!r} is unknown; known are {', '.join(known)}.")
        if name == _GPU_ONLY and not has_gpu():
            raise DwdpConfigError(
                f"{option} dp-ep needs GPUs: vLLM's CPU build fails at the first request of a "
                "data-parallel MoE model. Use replica, tp and stock here."
            )
    cores = len(os.sched_getaffinity(0))
    if not has_gpu() and cores < num_ranks:
        raise DwdpConfigError(
            f"--ranks {num_ranks} needs as many cores, and this process may use {cores}; every rank "
            "runs on cores of its own."
        )

"""What `vllm-dwdp bench` compares: DWDP and what else the same cores can run.

::

    dwdp       ranks that share one copy of the experts (dwdp mode "auto")
    prefetch   the same, copied layer by layer into slots
    replica    the same ranks with a full copy each (dwdp mode "replica")
    stock      a stock server per rank
    tp         one stock server, --tensor-parallel-size RANKS
    dp-ep      one stock server, --data-parallel-size RANKS --enable-expert-parallel; GPUs only

On the CPU every rank owns cores, and everything of a rank runs on them: its engine, its API server and
the client that drives it. So what a rank measures is its own.
"""

import contextlib
import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from vllm_dwdp.entrypoints.launch.server import Server, ServerError
from vllm_dwdp.errors import DwdpConfigError, DwdpError

DWDP = "dwdp"
BASELINES = ("replica", "tp", "stock", "prefetch", "dp-ep")
DEFAULT_BASELINES = ("replica", "tp")
_GPU_ONLY = "dp-ep"


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Ready servers.

    Args:
        name: as in the list above.
        servers: one, or one per rank.
        start_s: from the start of its processes to the first answer of all.
    """

    name: str
    servers: tuple[Server, ...]
    start_s: float = field(compare=False)

    def url(self, rank: int) -> str:
        """Say where the traffic of `rank` goes."""
        return self.servers[rank % len(self.servers)].url

    @property
    def commands(self) -> list[list[str]]:
        """The `vllm serve` of each server."""
        return [server.command for server in self.servers]

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
            for server in self.servers
            for process in (psutil.Process(server.process.pid), *server.processes())
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let its servers run only meanwhile (SIGCONT, SIGSTOP)."""
        for server in self.servers:
            server.resume()
        try:
            yield
        finally:
            for server in self.servers:
                server.suspend()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every deployment serves, and on what.

    Args:
        model: a folder or a name, as for `vllm serve`.
        num_ranks: of every deployment.
        arguments: further arguments of every `vllm serve`.
        folder: for logs and sockets.
    """

    model: str
    num_ranks: int
    arguments: tuple[str, ...]
    folder: Path

    def cores(self, rank: int) -> list[int]:
        """Choose the cores of a rank: an even share of ours, or all if they are fewer than the ranks."""
        ours = sorted(os.sched_getaffinity(0))
        first, last = (len(ours) * edge // self.num_ranks for edge in (rank, rank + 1))
        return ours[first:last] or ours


def has_gpu() -> bool:
    """Say whether an NVIDIA driver answers on this machine."""
    return Path("/proc/driver/nvidia/version").exists()


def check_baselines(names: Sequence[str], num_ranks: int) -> None:
    """Refuse what this machine cannot run.

    Raises:
        DwdpConfigError: an unknown baseline, one that needs a GPU, or fewer cores than ranks.
    """
    for name in names:
        if name not in BASELINES:
            raise DwdpConfigError(
                f"--baseline {name!r} is unknown; known are {', '.join(BASELINES)}."
            )
        if name == _GPU_ONLY and not has_gpu():
            raise DwdpConfigError(
                "--baseline dp-ep needs GPUs: vLLM's CPU build fails at the first request of a "
                "data-parallel MoE model. Use replica, tp and stock here."
            )
    cores = len(os.sched_getaffinity(0))
    if not has_gpu() and cores < num_ranks:
        raise DwdpConfigError(
            f"--ranks {num_ranks} needs as many cores, and this process may use {cores}; every rank "
            "runs on cores of its own."
        )


def start(stack: ExitStack, name: str, setting: Setting, say: Callable[[str], None]) -> Deployment:
    """Start a deployment, wait for its answer, bind it to its cores and suspend it.

    Raises:
        DwdpError: a server of it ended or did not answer in time.
    """
    started = time.monotonic()
    servers = tuple(_make_servers(stack, name, setting))
    for server in servers:
        try:
            server.wait_until_ready()
        except ServerError as error:
            say(str(error))
            raise DwdpError(
                f"{name} did not start; the end of its log is above. It was: "
                f"{shlex.join(server.command)}"
            ) from error
    for rank, server in enumerate(servers):
        if len(servers) > 1 and not has_gpu():
            _bind(server, setting.cores(rank))
        stack.callback(server.resume)
        server.suspend()
    made = Deployment(name=name, servers=servers, start_s=time.monotonic() - started)
    say(f"{name} answers after {made.start_s:.0f} s")
    return made


def _make_servers(stack: ExitStack, name: str, setting: Setting) -> Iterator[Server]:
    count = str(setting.num_ranks)
    common = [setting.model, "--served-model-name", "m", *setting.arguments]
    if name in ("tp", "dp-ep"):
        own = {
            "tp": ["--tensor-parallel-size", count],
            "dp-ep": ["--data-parallel-size", count, "--enable-expert-parallel"],
        }[name]
        binding = "|".join(_listed(setting.cores(rank)) for rank in range(setting.num_ranks))
        yield _server(stack, [*common, *own], setting.folder / f"{name}.log", binding)
        return
    own = [] if name == "stock" else _dwdp_arguments(stack, name, setting)
    for rank in range(setting.num_ranks):
        of_rank = [*own, *("--data-parallel-rank", str(rank))] if own else []
        log = setting.folder / f"{name}-{rank}.log"
        yield _server(stack, [*common, *of_rank], log, _listed(setting.cores(rank)))


def _dwdp_arguments(stack: ExitStack, name: str, setting: Setting) -> list[str]:
    """Start ranks one by one, so that each has an API server of its own."""
    meet = stack.enter_context(tempfile.TemporaryDirectory(prefix="dwdp-bench-"))
    dwdp = {"rendezvous": f"unix://{meet}/meet", "mode": "auto" if name == DWDP else name}
    return [
        *("--distributed-executor-backend", "dwdp"),
        *("--data-parallel-size", str(setting.num_ranks)),
        *("--additional-config", json.dumps({"dwdp": dwdp})),
    ]


def _server(stack: ExitStack, arguments: list[str], log: Path, binding: str) -> Server:
    environment = {} if has_gpu() else {"VLLM_CPU_OMP_THREADS_BIND": binding}
    return stack.enter_context(Server(arguments, log, environment))


def _bind(server: Server, cores: Sequence[int]) -> None:
    """Bind every thread of the server's processes, and all they will start, to `cores`."""
    for process in [psutil.Process(server.process.pid), *server.processes()]:
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cores)


def _listed(cores: Sequence[int]) -> str:
    return ",".join(str(core) for core in cores)

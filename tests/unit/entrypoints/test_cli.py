"""The command: exit status, JSON, and one line for what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.unit.distributed.test_messages import fingerprint
from tests.unit.planner.models import MIXTRAL_8X7B
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.entrypoints.cli.doctor import doctor
from vllm_dwdp.entrypoints.doctor.finding import Finding


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_doctor_is_usable_in_scripts() -> None:
    ended = run("doctor", "--json")
    findings = {entry["check"]: entry for entry in json.loads(ended.stdout)}
    assert {"vLLM", "copy engine", "open files", "memory", "sealed memory"} <= set(findings)
    problems = [entry for entry in findings.values() if entry["verdict"] == "problem"]
    assert ended.returncode == bool(problems)
    assert all(entry["advice"] for entry in findings.values() if entry["verdict"] != "ok")
    impossible = run("doctor", "--expert-gib", "1e6")
    assert impossible.returncode == 1
    assert "one copy of" in impossible.stdout


def test_status_of_a_rank_and_of_a_dead_one(tmp_path: Path) -> None:
    place = f"unix://{tmp_path}/meet"
    member = Membership.join(
        parse_endpoint(place),
        group=0,
        dwdp_rank=1,
        group_size=2,
        fingerprint=fingerprint(),
        join_timeout_s=1,
    )
    member.describe_by(lambda: {"mode": "direct", "steps": {"direct": 3}})
    ended = run("status", place, "--json")
    assert ended.returncode == 0
    (entry,) = json.loads(ended.stdout)
    told = {"mode": "direct", "steps": {"direct": 3}, "group": 0, "dwdp_rank": 1}
    told |= {"state": "starting", "doing": "loads its experts", "peers": {"0": "missing"}}
    assert told.items() <= entry.items()
    assert entry["generation"] == member.generation
    table = run("status", place).stdout
    assert "rank 1 of group 0 loads its experts" in table
    member.close()
    (tmp_path / "meet" / "g0-r0.sock").touch()
    ended = run("status", place)
    assert ended.returncode == 1
    assert "dead" in ended.stdout


def meeting_as(rank: int, folder: Path, status: dict[str, Any]) -> Membership:
    """Return a rank of two that says `status` of itself."""
    member = Membership.join(
        parse_endpoint(f"unix://{folder}/meet"),
        group=0,
        dwdp_rank=rank,
        group_size=2,
        fingerprint=fingerprint(),
        join_timeout_s=1,
    )
    member.describe_by(lambda: {"state": "serving"} | status)
    return member


@pytest.mark.parametrize(("state", "code"), [("dead", 1), ("ready", 0)])
def test_a_dead_rank_without_a_socket_is_known_to_its_peers(
    state: str, code: int, tmp_path: Path
) -> None:
    with meeting_as(0, tmp_path, {"peers": {"1": state}}):
        ended = run("status", f"unix://{tmp_path}/meet")
    assert f"1:{state}" in ended.stdout
    assert ended.returncode == code


def test_what_a_start_took_is_said(tmp_path: Path) -> None:
    seconds = {"load": 61.25, "meet": 2.0, "digest": 0.5, "map": 1.0, "measure": 0.0}
    said = {"start_seconds": seconds, "read_expert_bytes": 3 << 20, "digested_bytes": 4 << 20}
    with meeting_as(0, tmp_path, said):
        ended = run("status", f"unix://{tmp_path}/meet")
    expected = (
        "rank 0 of group 0 started: load 61.2 s, meet 2.0 s, digest 0.5 s, map 1.0 s, measure 0.0 s; "
        "read 3 MiB of experts from disk, digested 4 MiB"
    )
    assert expected in " ".join(ended.stdout.split())


def test_what_ranks_say_is_printed_as_it_is(tmp_path: Path) -> None:
    said = {"peers": {"1": "[/a]"}, "last_failure": "[/models/x] :bug: [bold]not there[/bold]"}
    with meeting_as(0, tmp_path, said):
        ended = run("status", f"unix://{tmp_path}/meet")
    assert ended.returncode == 0, ended.stderr
    assert said["last_failure"] in ended.stdout
    assert "1:[/a]" in ended.stdout


def test_the_table_is_followed_by_how_a_rank_reads_its_peers(tmp_path: Path) -> None:
    said = {
        "mode": "auto",
        "policy": "direct for steps of up to 64 tokens",
        "break_even_tokens": 8300,
    }
    with meeting_as(0, tmp_path, said):
        shown = " ".join(run("status", f"unix://{tmp_path}/meet").stdout.split())
    assert (
        "rank 0 of group 0 serves in auto mode: direct for steps of up to 64 tokens; copies are hidden "
        "in steps of about 8300 tokens and more" in shown
    )


def test_a_rank_that_hangs_is_not_called_dead(tmp_path: Path) -> None:
    place = f"unix://{tmp_path}/meet"
    with parse_endpoint(place).listen(0, 1):  # as one that is stopped: the kernel accepts for it
        ended = run("status", place, "--json")
        table = run("status", place)
    (entry,) = json.loads(ended.stdout)
    assert entry["state"] == "not answering"
    assert "did not say how it is in 2 s" in entry["last_failure"]
    assert (ended.returncode, table.returncode) == (1, 1)
    assert "rank 1 of group 0: listens at" in table.stdout


def test_doctor_prints_what_it_saw_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    seen = Finding("copy engine", "problem", "[/models/x] cannot be loaded", "see [/doc]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_dwdp.entrypoints.doctor.checks.examine", lambda **_: [seen])
        with pytest.raises(typer.Exit):
            doctor()
    printed = " ".join(capsys.readouterr().out.split())
    assert "problem" in printed
    assert "[/models/x]" in printed
    assert "[/doc]" in printed


def test_a_models_name_is_printed_as_it_is(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MIXTRAL_8X7B | {"architectures": ["[/x]ForCausalLM"]}))
    ended = run("plan", "--model", str(config))
    assert ended.returncode == 0, ended.stderr
    assert "[/x]" in ended.stdout


def test_status_tells_a_folder_without_ranks_from_one_that_it_may_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for place in ("empty", "absent"):
        ended = run("status", f"unix://{tmp_path}/{place}")
        assert (ended.returncode, "no rank meets at" in ended.stdout) == (1, True)
    ended = run("status", f"unix://{tmp_path}/file")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"{tmp_path}/file cannot be listed: Not a directory. Ask as the user" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("port", ["0", "65536"])
def test_launch_refuses_what_is_no_port(port: str) -> None:
    ended = run("launch", "m", "--port", port)
    assert ended.returncode == 2
    assert "'--port'" in ended.stderr


@pytest.mark.parametrize("place", ["abstract:x", "nowhere", "tcp://h:1"])
def test_what_it_refuses_is_one_line_and_exit_2(place: str) -> None:
    ended = run("status", place)
    assert ended.returncode == 2
    assert ended.stderr.startswith("vllm-dwdp: ")
    assert len(ended.stderr.strip().splitlines()) == 1

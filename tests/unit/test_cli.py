"""The command: exit status, JSON, and one line for what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.rendezvous import Rendezvous


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_dwdp.entrypoints.cli", *arguments],
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
    member = Rendezvous(
        Endpoint.parse(place),
        group=0,
        dwdp_rank=1,
        group_size=2,
        fingerprint=fingerprint(),
        join_timeout_s=1,
    )
    member.start()
    member.status_provider = lambda: {"mode": "direct", "steps": {"direct": 3}}
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


@pytest.mark.parametrize("place", ["abstract:x", "nowhere", "tcp://h:1"])
def test_what_it_refuses_is_one_line_and_exit_2(place: str) -> None:
    ended = run("status", place)
    assert ended.returncode == 2
    assert ended.stderr.startswith("vllm-dwdp: ")
    assert len(ended.stderr.strip().splitlines()) == 1

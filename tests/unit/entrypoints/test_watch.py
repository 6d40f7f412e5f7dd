"""`vllm-dwdp status --watch`: rates, restarts, pipes, terminals and its end."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.entrypoints.cli.watch import HEADINGS, Look, lines, rows

COMMAND = (sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "status")


def entry(**facts: Any) -> dict[str, Any]:
    known = {"group": 0, "dwdp_rank": 1, "state": "serving", "generation": 7, "mode": "prefetch"}
    known |= {"adopted": False, "rejoin_seconds": 0.0, "peers": {"0": "ready"}}
    return known | facts


def look(at_s: float, *entries: dict[str, Any]) -> Look:
    return Look(entries={(each["group"], each["dwdp_rank"]): each for each in entries}, at_s=at_s)


def cells(before: Look | None, now: Look) -> dict[str, str]:
    (row,) = rows(before, now)
    return dict(zip(HEADINGS, row, strict=True))


def test_rates_are_per_second() -> None:
    before = look(10.0, entry(forwards=100, fetched_bytes={"0": 1_000_000}, late_prefetches=2))
    counts = {"forwards": 130, "fetched_bytes": {"0": 5_000_000, "2": 2_000_000}}
    shown = cells(before, look(12.0, entry(**counts, late_prefetches=3)))
    assert shown == {
        "rank": "rank 1 of group 0",
        "state": "serving",
        "mode": "prefetch",
        "forwards/s": "15.0",
        "copied/s": "3.0 MB",
        "late": "3",
        "experts": "loaded",
        "peers": "0:ready",
    }


def test_a_rank_that_came_back_has_no_rate_at_first() -> None:
    before = look(10.0, entry(forwards=100))
    back = entry(forwards=5, generation=8, adopted=True, rejoin_seconds=3.14)
    shown = cells(before, look(12.0, back))
    assert (shown["forwards/s"], shown["copied/s"]) == ("", "")
    assert shown["experts"] == "adopted in 3.1 s"
    assert cells(None, look(12.0, back))["forwards/s"] == ""
    assert cells(look(1.0), look(12.0, back))["forwards/s"] == ""


def test_who_does_not_answer_is_shown() -> None:
    dead = {"group": 0, "dwdp_rank": 1, "state": "dead", "last_failure": "gone"}
    shown = cells(look(10.0, entry(forwards=1)), look(12.0, dead))
    assert shown["state"] == "dead"
    assert not any(shown[heading] for heading in HEADINGS[2:])
    assert "no rank is there" in lines(None, look(1.0))[0]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[str]:
    """Where one rank, of two, meets; it has begun another forward whenever it is asked."""
    place = f"unix://{tmp_path}/meet"
    member = Membership.join(
        parse_endpoint(place),
        group=0,
        dwdp_rank=0,
        group_size=2,
        fingerprint=fingerprint(),
        join_timeout_s=1,
    )
    asked: list[int] = []

    def status() -> dict[str, Any]:
        asked.append(1)
        return {"state": "serving", "mode": "direct", "forwards": len(asked)}

    member.describe_by(status)
    yield place
    member.close()


def read_until(fd: int, text: bytes, timeout_s: float = 30.0) -> bytes:
    deadline, found = time.monotonic() + timeout_s, b""
    while text not in found:
        assert time.monotonic() < deadline, found
        found += os.read(fd, 4096)
    return found


def test_a_pipe_gets_lines_and_no_escape_codes(place: str) -> None:
    with subprocess.Popen(
        [*COMMAND, place, "--watch", "--interval", "0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm"},
    ) as watching:
        assert watching.stdout is not None
        shown = read_until(watching.stdout.fileno(), b"forwards/s")
        watching.send_signal(signal.SIGINT)
        rest, errors = watching.communicate(timeout=30)
    assert watching.returncode == 0
    assert errors == b""
    first, *_ = shown.decode().splitlines()
    assert first.endswith("  rank 0 of group 0, state serving, mode direct, peers 1:missing")
    assert b"\x1b" not in shown + rest


def test_a_terminal_gets_one_table_and_its_cursor_back(place: str) -> None:
    ours, theirs = pty.openpty()
    command = [*COMMAND, place, "--watch", "--interval", "0.1"]
    settings = {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | settings,
        start_new_session=True,
    ) as watching:
        os.close(theirs)
        # Moved up to draw over what was there: the second look.
        shown = read_until(ours, b"\x1b[1A")
        watching.send_signal(signal.SIGINT)
        shown += read_until(ours, b"\x1b[?25h")
        assert watching.wait(timeout=30) == 0
    os.close(ours)
    assert b"serving" in shown
    assert b"Traceback" not in shown
    assert b"Aborted" not in shown


def test_json_is_refused_beside_watch(place: str) -> None:
    ended = subprocess.run(
        [*COMMAND, place, "--watch", "--json"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "leave out --watch" in ended.stderr

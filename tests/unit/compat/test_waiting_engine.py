"""A process that was forked early becomes the one that is spawned, and is none where it must not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.waiting import wait_until
from vllm_dwdp.compat.frontend import loading

pytestmark = pytest.mark.timeout(90)


def run(case: str, said: Path) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.helpers.waiting_work", case, str(said)],
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
        start_new_session=True,
    )
    assert ended.returncode == 0, ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def test_it_becomes_the_process_that_vllm_starts(tmp_path: Path) -> None:
    result = run("ordinary", tmp_path / "said")
    said = result["said"]
    assert said["pid"] == result["waiting"], "no other process was started"
    assert said["ppid"] == said["parent"] == result["pid"]
    assert said["parent_lives"]
    assert said["name"] == "EngineCore_DP1"
    assert (said["mine"], said["gone"]) == ("mine", False), "the environment of the moment"
    assert said["session"] == result["pid"]
    assert said["threads"] == 1
    assert result["code"] == 3 and not result["alive"]
    assert result["left"] == []


def test_its_death_is_seen(tmp_path: Path) -> None:
    result = run("killed", tmp_path / "said")
    assert result["code"] == -9
    assert result["left"] == []


@pytest.mark.parametrize("case", ["loaded otherwise", "with a descriptor"])
def test_where_it_must_not_be_used_a_process_is_spawned(case: str, tmp_path: Path) -> None:
    result = run(case, tmp_path / "said")
    assert result["code"] == 3
    assert result["said"]["pid"] != result["waiting"]
    wait_until(lambda: not psutil.pid_exists(result["waiting"]))


def test_a_second_process_is_spawned(tmp_path: Path) -> None:
    result = run("twice", tmp_path / "said")
    assert result["said"]["pid"] == result["waiting"] != result["again"]["pid"]


def test_one_that_is_never_needed_ends_with_its_front_end(tmp_path: Path) -> None:
    result = run("unused", tmp_path / "said")
    wait_until(lambda: not psutil.pid_exists(result["waiting"]))


def test_it_sees_the_end_of_its_front_end(tmp_path: Path) -> None:
    run("front end dies", tmp_path / "said")
    wait_until(lambda: (tmp_path / "said").read_text() == '"orphan"')


def test_variables_that_are_read_while_loading() -> None:
    before = {"LD_PRELOAD": "a", "OMP_NUM_THREADS": "2", "HOME": "/root"}
    now = {"LD_PRELOAD": "a", "GOMP_CPU_AFFINITY": "0 1", "HOME": "/", "CUDA_VISIBLE_DEVICES": "1"}
    assert loading.read_differently(before, now) == ["GOMP_CPU_AFFINITY", "OMP_NUM_THREADS"]
    assert loading.read_differently(before, before) == []


def test_what_the_user_preloads_stays() -> None:
    mine = {"LD_PRELOAD": "/mine/libiomp5.so:/mine/libtcmalloc.so.4"}
    assert loading.expected(mine)["LD_PRELOAD"] == mine["LD_PRELOAD"]
    assert loading.expected({"LD_PRELOAD": "/mine/x.so"})["LD_PRELOAD"].startswith("/mine/x.so:/")

"""`vllm-dwdp bench`, in its smallest size: real ranks, driven by vLLM's own benchmark."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_bench_measures_ranks_alone_and_beside_long_prompts(tmp_path: Path) -> None:
    output, picture = tmp_path / "result.json", tmp_path / "result.png"
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "bench", "--smoke"),
            *("--output", str(output), "--png", str(picture)),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | {"COLUMNS": "160"},
    )
    assert ended.returncode == 0, ended.stderr
    assert "dwdp answers after" in ended.stderr
    assert "not touched by another's long prompts" in ended.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(output.read_text())
    assert [load["name"] for load in result["loads"]] == [
        "even, below saturation",
        "even, saturated",
        "skewed, saturated",
        "last rank alone",
    ]
    assert len(result["runs"]) == 4
    for run in result["runs"]:
        assert run["figures"]["tokens_per_s"] > 0
        assert 0 < run["figures"]["itl_p50_ms"] <= run["figures"]["itl_p99_ms"]
        assert run["figures"]["ttft_p50_ms"] > 0
    (dwdp,) = result["deployments"].values()
    assert dwdp["memory_bytes"] > 2**28
    assert all("--data-parallel-rank" in command for command in dwdp["commands"])
    assert len(result["independence"]["dwdp"]) == 1
    assert result["command"].startswith("vllm-dwdp bench --smoke")

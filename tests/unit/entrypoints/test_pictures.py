"""Pictures are written whole, or refused in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dwdp.paper import DEEPSEEK_R1

WITHOUT = """
import importlib.util, sys
find, missing = importlib.util.find_spec, sys.argv[1]
importlib.util.find_spec = lambda name, *a: None if name == missing else find(name, *a)
sys.argv = sys.argv[1:]
from vllm_dwdp.entrypoints.cli.main import main
main()
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize(
    "command", [("plan",), ("simulate", "--requests", "50"), ("simulate", "--paper")]
)
def test_every_command_draws(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    png, html = tmp_path / "made.png", tmp_path / "made.html"
    ended = run(
        *("-m", "vllm_dwdp.entrypoints.cli.main", *command, "--model", str(tmp_path)),
        *("--png", str(png), "--html", str(html), "--json"),
    )
    assert ended.returncode == 0, ended.stderr
    assert png.read_bytes().startswith(b"\x89PNG")
    page = html.read_text()
    assert "plotly" in page
    assert '<script src="' not in page, "nothing is loaded from elsewhere"


@pytest.mark.parametrize(("option", "library"), [("--png", "matplotlib"), ("--html", "plotly")])
def test_a_missing_library_is_one_line(tmp_path: Path, option: str, library: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    place = str(tmp_path / "picture")
    ended = run("-c", WITHOUT, library, "plan", "--model", str(tmp_path), option, place)
    assert ended.returncode == 2
    assert ended.stderr.strip() == (
        f"vllm-dwdp: {option} needs {library}, which is not installed: pip install 'vllm-dwdp[plots]'."
    )

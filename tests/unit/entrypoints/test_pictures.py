"""Pictures are written whole, or refused in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dwdp.paper import DEEPSEEK_R1

WITHOUT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "matplotlib" else find(name, *a)
from vllm_dwdp.entrypoints.cli.main import main
main()
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize(
    ("command", "takes_a_model"),
    [(("plan",), True), (("simulate", "--requests", "50"), True), (("paper",), False)],
)
def test_every_command_draws(tmp_path: Path, command: tuple[str, ...], takes_a_model: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    model = ("--model", str(tmp_path)) if takes_a_model else ()
    png = tmp_path / "made.png"
    ended = run(
        *("-m", "vllm_dwdp.entrypoints.cli.main", *command, *model, "--png", str(png), "--json")
    )
    assert ended.returncode == 0, ended.stderr
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_missing_library_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    place = str(tmp_path / "picture")
    ended = run("-c", WITHOUT, "plan", "--model", str(tmp_path), "--png", place)
    assert ended.returncode == 2
    assert ended.stderr.strip() == (
        "vllm-dwdp: --png needs matplotlib, which is not installed: pip install 'vllm-dwdp[plots]'."
    )

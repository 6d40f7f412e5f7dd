"""Runs a scenario in a process of its own; knows why it cannot be run."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDS = {
    "gather": "triton",
    "ranks_meet": "msgspec",
    "a_rank_is_killed": "msgspec",
    "engines": "vllm",
    "reference": "pytest",
}
"""Packages that the bundle of `../shared/gpu` brings to a machine that lacks them."""
TIMEOUT_S = {"engines": 300}


def why_not(scenario: str = "") -> str:
    """Why the scenario cannot run here; empty if it can."""
    import torch

    package = NEEDS.get(scenario, "torch")
    if not torch.cuda.is_available():
        return f"no GPU is visible to torch {torch.__version__}"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed: `. vllm-bundle/activate.sh` first (docs/gpu.md)"
    return ""


def run_scenario(
    scenario: str, argument: str, environment: dict[str, str] | None = None
) -> tuple[bool, str]:
    """Whether it passed, and what it printed; whatever it started is ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.scenarios", scenario, argument],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=TIMEOUT_S.get(scenario, 120))[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0] + "\n(ran past its time)"
    return process.returncode == 0 and output.endswith("ok\n"), output

"""Runs a scenario in a process of its own; knows why it cannot be run."""

import importlib.util
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
VLLM = ("dual_batch_overlap", "engines", "a_rank_returns", "kv_sizing")
NEEDS = {
    "gather": "triton",
    "ranks_meet": "msgspec",
    "a_rank_is_killed": "msgspec",
    "reference": "pytest",
    "external_nodes": "pytest",
} | dict.fromkeys(VLLM, "vllm")
"""Packages that the bundle of `../shared/gpu` brings to a machine that lacks them."""
TIMEOUT_S = {"external_nodes": 30.0, "engines": 300.0, "a_rank_returns": 300.0, "kv_sizing": 300.0}
OTHERWISE_S = 120.0
FACTS = ("external_nodes",)
"""Scenarios that the product does not depend on: no outcome of theirs is a failure."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a scenario ended.

    Args:
        passed: by itself and without an error.
        timed_out: it was ended because its time was over.
        output: what it printed.
    """

    passed: bool
    timed_out: bool
    output: str


def title_of(scenario: str, argument: str) -> str:
    """As `--only` of `python3 -m tests.gpu` takes it."""
    return f"{scenario}:{argument}" if argument else scenario


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
    scenario: str,
    argument: str,
    environment: dict[str, str] | None = None,
    timeout_s: float | None = None,
) -> Outcome:
    """Run it; whatever it started is ended.

    Args:
        timeout_s: less than the scenario's own, if it must be.
    """
    own_s = TIMEOUT_S.get(scenario, OTHERWISE_S)
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
        output = process.communicate(timeout=min(own_s, timeout_s or own_s))[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0] + "\n(ran past its time)"
        return Outcome(passed=False, timed_out=True, output=output)
    passed = process.returncode == 0 and output.endswith("ok\n")
    return Outcome(passed=passed, timed_out=False, output=output)

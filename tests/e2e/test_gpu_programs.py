"""The rest of the GPU programs over the fake driver: what takes longer, and what starts engines.

That they run, not what a GPU would do; see `tests/gpu/test_simulated.py` for the others.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_checks.accelerator import simulated_environment
from tests.gpu.running import VLLM, run_scenario
from tests.gpu.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(330)]

# Graphs and their compiler, the V1 runner on GPUs and the size of a device's memory have no stand-in.
ENGINES = [("engines", "fp8"), ("a_rank_returns", ""), ("dual_batch_overlap", "")]
OTHERS = [
    (scenario, argument)
    for scenario, arguments in SCENARIOS.items()
    if scenario not in VLLM
    for argument in arguments[1:]
]


@pytest.mark.parametrize(("scenario", "argument"), ENGINES + OTHERS)
def test_scenarios_run(scenario: str, argument: str) -> None:
    outcome = run_scenario(scenario, argument, simulated_environment())
    assert outcome.passed, outcome.output[-6000:]


def test_the_first_minutes_ask_every_question(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "scripts/gpu_first_minutes.py", "--jobs", "2"],
        cwd=ROOT,
        env=simulated_environment() | {"OUT": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "vllm_smoke was NOT ASKED" in result.stdout
    answers = json.loads((tmp_path / "first_minutes.json").read_text())
    assert len(answers) == 17 and all(answer["good"] is not False for answer in answers)

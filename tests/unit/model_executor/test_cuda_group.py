"""A rank's views on the CUDA device, over the fake driver. NOT A GPU."""

import subprocess
import sys
from pathlib import Path

from gpu_checks.fake_cuda import fake_cuda_environment

ROOT = Path(__file__).parents[3]
SCENARIOS = (
    "a_rank_that_holds_every_page_reads_in_place",
    "auto_measures_and_keeps_both_views",
    "slots_are_given_back_where_direct_always_wins",
)


def test_in_a_process_with_the_fake_driver() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.unit.model_executor.cuda_group_scenarios", *SCENARIOS],
        cwd=ROOT,
        env=fake_cuda_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.stdout.splitlines() == [f"ok {name}" for name in SCENARIOS], ended.stderr
    assert ended.returncode == 0

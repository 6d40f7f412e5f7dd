"""Rings, schedule, queue and graph seam together, over the fake driver, at random speed. NOT A GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpu_checks.fake_cuda import fake_cuda_environment

ROOT = Path(__file__).parents[3]
SCENARIOS = [
    "eager_piecewise_and_full_steps_read_their_own_layers",
    "steps_in_flight_and_mixed_kinds",
    "without_the_wait_poison_is_read",
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_delay_us": 300, "seed": 1},
        {"max_delay_us": 300, "seed": 2, "event_nodes": "run"},
        {"max_delay_us": 100, "seed": 3, "version": 12070},
    ],
    ids=["batch copies", "events looked at late", "driver without batch copies"],
)
def test_every_layer_reads_its_own_experts(settings: dict[str, object]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.unit.prefetch.cuda_ring_scenarios", *SCENARIOS],
        cwd=ROOT,
        env=fake_cuda_environment(**settings),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.stdout.splitlines() == [f"ok {name}" for name in SCENARIOS], ended.stderr
    assert ended.returncode == 0

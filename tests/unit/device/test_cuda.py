"""The CUDA device's memory over the fake driver, which keeps the documented rules. NOT A GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpu_checks.fake_cuda import fake_cuda_environment

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("scenarios", "settings"),
    [
        (
            [
                "a_composite_shows_pages_of_a_shard_a_peer_and_a_slot",
                "a_shard_of_an_earlier_life_is_adopted",
                "one_changed_byte_changes_the_digest",
                "what_fails_halfway_is_given_back",
                "a_device_without_fabric_handles_is_refused",
            ],
            {},
        ),
        (["too_little_memory_names_what_is_needed_and_free"], {"memory_mib": 64}),
        (["a_shard_is_passed_by_fabric_handles"], {"fabric": 1}),
        (["a_driver_without_read_only_mappings_is_said_once"], {"read_only": 0}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_in_a_process_with_the_fake_driver(
    scenarios: list[str], settings: dict[str, object]
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.unit.device.cuda_memory_scenarios", *scenarios],
        cwd=ROOT,
        env=fake_cuda_environment(**settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.stdout.splitlines() == [f"ok {name}" for name in scenarios], ended.stderr
    assert ended.returncode == 0

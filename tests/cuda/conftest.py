"""Tests of the CUDA device over the fake driver: `env $(python -m gpu_checks.fake) pytest tests/cuda`.

NOT A GPU: what passes here shows that our code keeps the rules that the driver's reference states, not
that hardware does. Without the fake these tests are skipped; `make test-cuda` runs them.
"""

import os
from collections.abc import Iterator

import pytest

from gpu_checks.driver_memory import open_files
from gpu_checks.fake import LiveObjects, fake_driver, live_objects

NOTHING = LiveObjects(0, 0, 0, 0, 0, 0)
collect_ignore_glob = ["test_*.py"] if fake_driver() is None else []


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Every test gives back what it took of the driver, and its descriptors."""
    files = open_files()
    yield
    assert live_objects() == NOTHING
    assert open_files() == files, "a descriptor was left open"


def is_older_driver() -> bool:
    """Whether this process's driver was started without batch copies."""
    return "DWDP_FAKE_CUDA_VERSION" in os.environ

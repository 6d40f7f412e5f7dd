"""What touches vLLM is tested with every version of it."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder; all of a session are handed to this."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.every_version)

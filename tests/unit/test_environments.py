"""Environments that tests make for packages of their own."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import environments


def test_processes_that_ask_at_once_share_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call opens the lock itself, so that threads exclude each other as processes do."""
    made = []

    def make(folder: Path, python: Path, packages: tuple[str, ...]) -> None:
        folder.mkdir(exist_ok=True)
        time.sleep(0.2)
        made.append(packages)

    monkeypatch.setattr(environments, "_make", make)
    folder = tmp_path / "cache" / "own"
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: environments.environment(folder, "a", "b"), range(3)))
    assert found == [folder / "bin" / "python"] * 3
    assert made == [("a", "b")]

"""Shared checkpoints and the processes that run engines. Everything started here is ended here."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_checks.checkpoints import make_checkpoint
from tests.e2e.matrix import run_cases
from tests.helpers.engines import server_pids

LONGEST_FIRST = ("survival", "serve", "bench", "failed_starts", "topologies", "kill_points")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that take longest, so that two workers end at about the same time."""
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> "Checkpoints":
    """Random-weight checkpoints, made once per session."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


class Checkpoints:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, architecture: str, num_experts: int = 8, **overrides: object) -> str:
        # No brackets or blanks in the name: vLLM looks for weights with glob.
        digest = hashlib.sha256(repr(sorted(overrides.items())).encode()).hexdigest()[:8]
        folder = self.folder / f"{architecture}-{num_experts}-{digest}"
        return str(make_checkpoint(folder, architecture, num_experts, **overrides))


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> "StockEngine":
    """Stock vLLM to compare with, run once per session and model."""
    return StockEngine(tmp_path_factory.mktemp("stock"))


class StockEngine:
    """Results of stock engines in one process each, by model and settings, computed when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._results: dict[str, dict[str, Any]] = {}

    def __call__(self, model: str, **settings: Any) -> dict[str, Any]:
        """Return the result of a case of this model and these settings."""
        return self.all([model], **settings)[model]

    def all(
        self, models: Sequence[str], environment: dict[str, str] | None = None, **settings: Any
    ) -> dict[str, dict[str, Any]]:
        """Return the results by model; missing ones are computed by two processes beside each other."""
        names = {
            model: json.dumps([model, environment or {}, settings], sort_keys=True)
            for model in models
        }
        missing = [
            {"name": name, "model": model} | settings
            for model, name in names.items()
            if name not in self._results
        ]

        def run(half: int) -> dict[str, list[dict[str, Any]]]:
            cases = missing[half::2]
            name = f"{len(self._results)}-{half}"
            return run_cases(self._folder, name, cases, environment) if cases else {}

        with ThreadPoolExecutor(2) as pool:
            for results in list(pool.map(run, (0, 1))):
                self._results |= {name: result for name, (result,) in results.items()}
        return {model: self._results[name] for model, name in names.items()}


@pytest.fixture(autouse=True, scope="module")
def no_process_is_left_behind() -> Iterator[None]:
    """Whatever a module started has ended when it is over."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    before |= server_pids()
    children = psutil.Process().children(recursive=True)
    left = [child for child in children if child.pid not in before and is_ours(child)]
    alive = psutil.wait_procs(left, timeout=20)[1]
    assert not alive, [child.cmdline() for child in alive]


def is_ours(process: psutil.Process) -> bool:
    try:
        return "resource_tracker" not in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False

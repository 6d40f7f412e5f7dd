"""Notes how the tests of a session ended; a plugin of pytest that tests/conftest.py registers.

One file for each version of vLLM; a session adds to it what it ran. Of several processes that share the
tests (xdist) the first one writes.
"""

import json
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".test-results"
WORST_LAST = ("passed", "skipped", "failed")


def vllm_version() -> str:
    """Return this environment's version of vLLM, without what its build adds, or `none`."""
    try:
        return metadata.version("vllm").partition("+")[0]
    except metadata.PackageNotFoundError:
        return "none"


def recorded(version: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Return what was noted with a version of vLLM: `tests` by id, and what they ran on."""
    try:
        noted: dict[str, Any] = json.loads((folder / f"{version}.json").read_text())
    except FileNotFoundError:
        return {"tests": {}}
    return noted


class Recorder:
    """Collects how each test ended, over its set-up, call and tear-down."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._ended: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst of the phases of a test."""
        before = self._ended.get(report.nodeid)
        if before and WORST_LAST.index(before["outcome"]) >= WORST_LAST.index(report.outcome):
            return
        self._ended[report.nodeid] = {"outcome": report.outcome, "date": today()}
        if report.skipped and isinstance(report.longrepr, tuple):
            self._ended[report.nodeid]["reason"] = report.longrepr[2].removeprefix("Skipped: ")

    def pytest_sessionfinish(self) -> None:
        """Write, unless nothing ran."""
        if not self._ended:
            return
        version = vllm_version()
        known = recorded(version, self._folder)["tests"]
        noted = {"vllm": version, **surroundings(), "tests": known | self._ended}
        self._folder.mkdir(exist_ok=True)
        whole = self._folder / f"{version}.json"
        part = whole.with_suffix(f".{os.getpid()}.tmp")
        part.write_text(json.dumps(noted, indent=0, sort_keys=True))
        part.replace(whole)


def surroundings() -> dict[str, str]:
    """Return what the tests run on."""
    found = {"python": platform.python_version(), "machine": machine()}
    for package in ("torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def machine() -> str:
    """Return the processor by name, and how many cores of it may be used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def today() -> str:
    return datetime.now(UTC).date().isoformat()

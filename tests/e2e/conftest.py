"""Shared checkpoints and the processes that run engines. Everything started here is ended here."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gpu_checks.checkpoints import make_checkpoint
from tests.helpers.engines import server_pids


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

"""Every command that a page shows is typed as it stands, or says what it needs.

What needs no server runs by itself, in `make test`; pages with servers and engines are followed from top
to bottom, in `make test-all`. For MODEL stands a small checkpoint, and for 8000 a free port. The quick
start is followed a second time, with the wheel in an environment that has nothing else.
"""

import os
import platform
import re
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_checks.checkpoints import make_checkpoint
from tests.e2e.conftest import Checkpoints
from tests.helpers.documented import PAGES, ROOT, Step, steps
from tests.helpers.environments import Unavailable
from tests.helpers.reader import Reader, runs_alone
from tests.helpers.wheels import build_wheels

pytestmark = pytest.mark.e2e

TYPED = [step for page in PAGES for step in steps(page) if not step.mark]
ALONE = [step for step in TYPED if runs_alone(step)]
FOLLOWED = sorted({step.page for step in TYPED if not runs_alone(step)})
QUICK_START = "docs/quickstart.md"


@pytest.fixture
def reader(checkpoints: Checkpoints, tmp_path: Path) -> Iterator[Reader]:
    # The weights that docs/weights.md gives to ranks that serve.
    make_checkpoint(tmp_path / "step-42", "qwen3_moe", 8, seed=42)
    started = Reader(tmp_path, checkpoints("qwen3_moe", 8))
    try:
        yield started
    finally:
        started.end()


@pytest.mark.parametrize("step", ALONE, ids=str)
def test_a_command_that_needs_nothing_runs(step: Step, reader: Reader) -> None:
    reader.type(step)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", FOLLOWED)
def test_a_page_can_be_followed_from_top_to_bottom(page: str, reader: Reader) -> None:
    assert reader.follow(page)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_quick_start_can_be_followed_with_the_wheel(
    checkpoints: Checkpoints, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """`pip install` as the page says, in an empty environment, and on to the page's last line."""
    folder, installed = tmp_path / "empty", tmp_path / "installed"
    folder.mkdir()
    (install,) = (step for step in steps(ROOT / QUICK_START) if "--find-links dist" in step.text)
    try:
        build_wheels(folder / "dist", request.config.cache)
    except Unavailable as reason:
        pytest.skip(str(reason))
    venv.create(installed, with_pip=True)
    # Where PyTorch's index cannot be reached pip would ask it again and again for each package.
    settings = {
        "PATH": f"{installed / 'bin'}:{os.environ['PATH']}",
        "PIP_RETRIES": "0",
        "PYTHONPATH": "",
    }
    ended = subprocess.run(
        install.text,
        shell=True,
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    if "No matching distribution found for torch==" in ended.stderr:
        pytest.skip(f"no CPU build of torch for {platform.python_version()} can be had here")
    assert ended.returncode == 0, ended.stderr
    reader = Reader(folder, checkpoints("qwen3_moe", 8), installed)
    try:
        for step in ALONE:
            if step.page == QUICK_START:
                shown = reader.type(step)
                if "doctor" in step.words:
                    assert re.search(r"vLLM.*ok.*vllm 0\.", shown), shown
                    assert re.search(r"torch.*ok.*\+cpu", shown), shown
        assert sum(step.is_server for step in reader.follow(QUICK_START)) == 2
    finally:
        reader.end()

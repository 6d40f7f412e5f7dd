"""The wheels of a release, built as for one."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.environments import environment

ROOT = Path(__file__).parents[2]
COMPILER = "ziglang==0.17.1"


def build_wheels(folder: Path, cache: pytest.Cache) -> None:
    """Run `scripts/build_wheels.sh`; the compiler and what it compiled once are kept between sessions.

    Raises:
        Unavailable: the compiler cannot be had here.
    """
    python = environment(cache.mkdir(COMPILER.replace("==", "-")), COMPILER)
    settings = {"PYTHON": str(python), "ZIG_GLOBAL_CACHE_DIR": str(cache.mkdir("zig"))}
    subprocess.run(
        ["scripts/build_wheels.sh", folder], cwd=ROOT, env=os.environ | settings, check=True
    )

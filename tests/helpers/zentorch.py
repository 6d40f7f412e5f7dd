"""An environment of its own with zentorch, which changes what vLLM runs on AMD processors.

Everything else comes from the environment of the tests; only zentorch and what it needs is installed,
from PyPI, into a folder that later sessions find again.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

NEEDED = ("deprecated", "wrapt")
"""What zentorch imports and the environment of the tests need not have."""
INSTALL_S = 300


class Unavailable(Exception):
    """It cannot be had here; the text says why."""


def interpreter(cache: Path) -> Path:
    """Return the Python of an environment with zentorch for the torch of the tests.

    Args:
        cache: folder that is kept between sessions.

    Raises:
        Unavailable: the processor is another, or PyPI has none or cannot be reached.
    """
    import torch
    from vllm.platforms import _is_amd_zen_cpu

    if not _is_amd_zen_cpu():
        raise Unavailable("zentorch is for AMD processors with AVX-512, and this is none")
    version = torch.__version__.partition("+")[0]
    folder = cache / f"torch-{version}-python-{sysconfig.get_python_version()}"
    python = folder / "bin" / "python"
    done = folder / "done"
    if not done.exists():
        _make(folder, python, [f"zentorch=={version}.*", *NEEDED])
        done.touch()
    return python


def _make(folder: Path, python: Path, packages: list[str]) -> None:
    venv.create(folder, clear=True, with_pip=False)
    target = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    Path(target, "tests.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, *packages]
    try:
        ended = subprocess.run(
            command,
            env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip did not install {packages[0]} within {INSTALL_S} s") from None
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["pip said nothing"]
        raise Unavailable(f"pip cannot install {packages[0]}: {lines[-1]}")

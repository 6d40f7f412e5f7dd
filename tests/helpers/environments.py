"""Environments of their own for packages that the project does not depend on.

Everything else comes from the environment of the tests. They are installed from PyPI into a folder that
later sessions find again.
"""

import fcntl
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

INSTALL_S = 300
PACKAGES = "site-packages"


class Unavailable(Exception):
    """It cannot be had here; the text says why."""


def environment(folder: Path, *packages: str) -> Path:
    """Return the Python of an environment with these packages beside those of the tests.

    Test processes that run side by side may ask for the same one: the first makes it.

    Args:
        folder: of it; made once.
        packages: with options of pip, as for `pip install`.

    Raises:
        Unavailable: PyPI has none or cannot be reached.
    """
    python, done = folder / "bin" / "python", folder / "done"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            _make(folder, python, packages)
            done.touch()
    return python


def make_venv(folder: Path) -> Path:
    """Make an environment anew whose packages come before those of this one, and return their folder."""
    venv.create(folder, clear=True, with_pip=False)
    own = subprocess.check_output(
        [folder / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        text=True,
    ).strip()
    # What is there already is not installed again, and pip itself is there. All folders are listed,
    # since Python follows no .pth file of a folder that one names.
    folders = [sysconfig.get_path("purelib"), *(each for each in sys.path if PACKAGES in each)]
    Path(own, "tests.pth").write_text("".join(f"{each}\n" for each in dict.fromkeys(folders)))
    return Path(own)


def _make(folder: Path, python: Path, packages: tuple[str, ...]) -> None:
    make_venv(folder)
    command = [str(python), "-m", "pip", "install", *packages]
    name = next(package for package in packages if not package.startswith("-"))
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
        raise Unavailable(f"pip did not install {name} within {INSTALL_S} s") from None
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["pip said nothing"]
        raise Unavailable(f"pip cannot install {name}: {lines[-1]}")

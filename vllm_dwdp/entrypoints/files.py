"""Files that the commands write: refused at once, in one line, where they could not be written."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_dwdp.errors import DwdpConfigError


def check_writable(option: str, path: Path) -> None:
    """Refuse a file that could not be written, before an hour of work.

    Raises:
        DwdpConfigError: its folder is missing or may not be written, or it is a folder itself.
    """
    with refusing(option, path):
        is_new = not path.exists()
        with path.open("a"):
            pass
        if is_new:
            path.unlink()


def make_folder(option: str, path: Path) -> None:
    """Make a folder for files, if it is not there.

    Raises:
        DwdpConfigError: it cannot be made, or no file can be made in it.
    """
    with refusing(option, path, "a folder in which files can be made"):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


def make_temporary_folder() -> Path:
    """Make a folder where programs put what goes with them; the caller removes it.

    Raises:
        DwdpConfigError: nothing can be written there.
    """
    try:
        return Path(tempfile.mkdtemp(prefix="vllm-dwdp-"))
    except OSError as error:
        raise DwdpConfigError(
            f"no folder for temporary files can be written ({error.strerror}): set TMPDIR to one "
            "that can."
        ) from error


@contextmanager
def refusing(
    option: str, path: Path, wanted: str = "a file in a writable folder"
) -> Iterator[None]:
    """Say in a line that a file or folder cannot be written, and what to give instead.

    Raises:
        DwdpConfigError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise DwdpConfigError(
            f"{option} {path} cannot be written ({error.strerror}): give {wanted}."
        ) from error


def write_json(option: str, path: Path, content: Any) -> None:
    """Write a result file.

    Raises:
        DwdpConfigError: the path cannot be written.
    """
    with refusing(option, path):
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

"""Files that the commands write: refused at once, in one line, where they could not be written."""

import json
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


@contextmanager
def refusing(option: str, path: Path) -> Iterator[None]:
    """Say in a line that a file cannot be written.

    Raises:
        DwdpConfigError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise DwdpConfigError(
            f"{option} {path} cannot be written ({error.strerror}): give a file in a writable folder."
        ) from error


def write_json(option: str, path: Path, content: Any) -> None:
    """Write a result file.

    Raises:
        DwdpConfigError: the path cannot be written.
    """
    with refusing(option, path):
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

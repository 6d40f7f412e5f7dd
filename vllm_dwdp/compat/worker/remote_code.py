"""Code that comes with a checkpoint: one process at a time copies it into the cache of modules.

With `trust_remote_code` transformers copies such files into one folder (`HF_MODULES_CACHE`), in place,
and imports them from there: configurations in a front end, tokenizers in API servers and engines. Those
that start together, as all of a launch and all of one server do, would read files that another one has
begun to write.
"""

import fcntl
import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vllm_dwdp.errors import DwdpConfigError

LOCK = ".dwdp-lock"
WAIT_S = 600.0
POLL_S = 0.05

_ours = threading.RLock()
_depth = 0


def install() -> None:
    """From now on, this process copies code of checkpoints under a lock of the cache's folder."""
    from transformers import dynamic_module_utils

    stock = dynamic_module_utils.get_cached_module_file
    if hasattr(stock, "dwdp_stock"):
        return

    @functools.wraps(stock)
    def get_cached_module_file(*args: Any, **kwargs: Any) -> Any:
        with locked(Path(dynamic_module_utils.HF_MODULES_CACHE)):
            return stock(*args, **kwargs)

    get_cached_module_file.dwdp_stock = stock  # type: ignore[attr-defined]
    dynamic_module_utils.get_cached_module_file = get_cached_module_file


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While active, no other process is; the kernel drops the lock of one that dies. May be nested.

    A folder that cannot be written has no lock: nothing is copied there.

    Raises:
        DwdpConfigError: another process holds it for too long.
    """
    global _depth
    with _ours:
        if _depth:
            yield  # a module that needs another one, of a hub
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("ab")
        except OSError:
            yield
            return
        with file:
            _acquire(file)
            _depth += 1
            try:
                yield
            finally:
                _depth -= 1


def _acquire(file: BinaryIO) -> None:
    """Lock a file; closing it gives the lock back."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DwdpConfigError(
                    f"trust_remote_code: another process holds {file.name} for {WAIT_S:g} s (`fuser "
                    f"{file.name}` names it). End it, or set HF_MODULES_CACHE to another folder."
                ) from None
        time.sleep(POLL_S)

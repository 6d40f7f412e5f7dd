"""Code that comes with a checkpoint: one process at a time copies it into the cache of modules.

With `trust_remote_code` transformers copies such files into one folder (`HF_MODULES_CACHE`), in place,
and imports them from there: configurations in a front end, tokenizers in API servers and engines. Those
that start together, as all of a launch and all of one server do, would read files that another one has
begun to write.
"""

import fcntl
import functools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

    Raises:
        DwdpConfigError: another process holds it for too long, or the folder cannot be used.
    """
    global _depth
    with _ours:
        if _depth:
            yield  # a module that needs another one, of a hub
            return
        file = _acquire(folder / LOCK)
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
            os.close(file)


def _acquire(path: Path) -> int:
    """Open and lock a file; closing it gives the lock back."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DwdpConfigError(
            f"trust_remote_code: {path.parent} cannot be written: {error}. Set HF_MODULES_CACHE to a "
            "folder that can."
        ) from error
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(file)
                raise DwdpConfigError(
                    f"trust_remote_code: another process holds {path} for {WAIT_S:g} s (`fuser {path}` "
                    "names it). End it, or set HF_MODULES_CACHE to another folder."
                ) from None
            time.sleep(POLL_S)
        else:
            return file

"""How long the ranks of a launch may take to start, and to finish what they serve at the end."""

import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from vllm_dwdp.errors import DwdpConfigError

BASE_S = 60.0
"""To import, to build the model and to warm up."""
SECONDS_PER_GB = 10.0
"""A disk that reads 100 MB/s."""
UNKNOWN_BYTES = 720 * 10**9
"""Assumed of a model that is not on this machine yet: two hours, so that it can be downloaded."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SHUTDOWN_TIMEOUT = "--shutdown-timeout"


def default_start_timeout_s(model: str, join_timeout_s: float) -> float:
    """Add up the longest wait for peers, a minute, and the time to read from a slow disk.

    So a rank whose peer is missing has time to say so itself.
    """
    num_bytes = model_bytes(model)
    reading_s = SECONDS_PER_GB * (UNKNOWN_BYTES if num_bytes is None else num_bytes) / 1e9
    return join_timeout_s + BASE_S + reading_s


def model_bytes(model: str) -> int | None:
    """Bytes of the weights of a model on this machine; None if it is not here (or has none).

    Args:
        model: a folder, a file, or a name whose snapshots are looked for where Hugging Face keeps them.
    """
    place = (
        Path(model)
        if Path(model).exists()
        else _hub_cache() / f"models--{model.replace('/', '--')}"
    )
    files = [place] if place.is_file() else [*place.rglob("*")]
    # Snapshots are links to blobs, of which two revisions may share one.
    sizes = {
        file.resolve(): file.stat().st_size
        for file in files
        if file.suffix in WEIGHTS and file.is_file()
    }
    return sum(sizes.values()) or None


def _hub_cache() -> Path:
    """Where Hugging Face keeps what it downloads, as its documentation says."""
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def shutdown_timeout_s(arguments: Sequence[str]) -> float:
    """How long vLLM lets running requests finish when it is told to end: its `--shutdown-timeout`.

    Args:
        arguments: for `vllm serve`, of which the last one that says so counts.

    Raises:
        DwdpConfigError: the value is no number of seconds.
    """
    found = 0.0
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        option, separator, value = argument.partition("=")
        if is_shutdown_timeout(option):
            found = _seconds(value if separator else following)
    return found


def is_shutdown_timeout(option: str) -> bool:
    """Whether vLLM's parser takes it for that: it accepts `_` for `-`, and beginnings that are clear."""
    name = option.replace("_", "-")
    return len(name) > len("--sh") and SHUTDOWN_TIMEOUT.startswith(name)


def _seconds(text: str) -> float:
    if not text.isdecimal():
        raise DwdpConfigError(f"{SHUTDOWN_TIMEOUT} {text!r} must be a whole number of seconds.")
    return float(text)

"""Loggers under `vllm.dwdp`.

vLLM installs one handler, on the logger named `vllm`; a name outside that tree prints nothing.
"""

import logging


def init_logger(name: str) -> logging.Logger:
    """Return the logger `vllm.dwdp.<module>` for the module `vllm_dwdp.<module>`."""
    return logging.getLogger("vllm.dwdp" + name.removeprefix("vllm_dwdp"))


def format_gib(num_bytes: int) -> str:
    """Bytes as GiB (2**30), with the digits that a small model needs."""
    gib = num_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{gib:.5f} GiB"

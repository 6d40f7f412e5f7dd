"""The name that chooses DWDP, the classes behind it, and how many ranks one offline `LLM` drives."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BACKEND = "dwdp"
EXECUTOR_CLS = "vllm_dwdp.executor.executor.DwdpExecutor"
WORKER_CLS = {
    "cpu": "vllm_dwdp.executor.cpu_worker.DwdpCPUWorker",
    "cuda": "vllm_dwdp.executor.gpu_worker.DwdpGPUWorker",
}
"""The worker of each kind of device that vLLM may be built for."""


def is_chosen(args: Any) -> bool:
    """Whether these arguments of vLLM ask for DWDP."""
    return getattr(args, "distributed_executor_backend", None) in (BACKEND, EXECUTOR_CLS)


_offline_size: int | None = None


@contextmanager
def offline_data_parallel(size: int) -> Iterator[None]:
    """While active, configs are made for `size` ranks driven by one offline `LLM`."""
    global _offline_size
    assert _offline_size is None
    _offline_size = size
    try:
        yield
    finally:
        _offline_size = None


def offline_size() -> int | None:
    """Ranks of the offline `LLM` that is being built, or None."""
    return _offline_size

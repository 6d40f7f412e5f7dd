"""The name that chooses DWDP, the classes behind it, and how many ranks one offline `LLM` drives."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BACKEND = "dwdp"
EXECUTOR_CLS = {
    "uni": "vllm_dwdp.executor.executor.DwdpExecutor",
    "mp": "vllm_dwdp.executor.executor.DwdpMultiprocExecutor",
}
"""The class behind each value of the option `executor`."""
WORKER_CLS = {
    "cpu": "vllm_dwdp.executor.cpu_worker.DwdpCPUWorker",
    "cuda": "vllm_dwdp.executor.gpu_worker.DwdpGPUWorker",
}
"""The worker of each kind of device that vLLM may be built for."""


def is_chosen(args: Any) -> bool:
    """Whether these arguments of vLLM ask for DWDP."""
    chosen = getattr(args, "distributed_executor_backend", None)
    return chosen == BACKEND or chosen in EXECUTOR_CLS.values()


def executor_cls(executor: str | None, chosen: Any) -> str:
    """The executor's dotted name: of the option, of what the user chose by that name, or the default."""
    if executor is None and chosen in EXECUTOR_CLS.values():
        return str(chosen)
    return EXECUTOR_CLS[executor or "uni"]


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

"""The name that chooses DWDP, the classes behind it, and how many ranks one offline `LLM` drives."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_dwdp.errors import DwdpConfigError, DwdpUnsupportedError

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


def executor_cls(executor: str | None, chosen: Any, num_workers: int = 1) -> str:
    """Return the executor's dotted name, from the option, the user's choice or the default.

    Args:
        num_workers: of a rank; several have a process each.

    Raises:
        DwdpConfigError: several workers were to run in the engine's process.
    """
    if executor is None and chosen in EXECUTOR_CLS.values():
        executor = next(name for name, dotted in EXECUTOR_CLS.items() if dotted == chosen)
    if executor == "uni" and num_workers > 1:
        raise DwdpConfigError(
            "dwdp executor='uni' runs the only worker of a rank in the engine's process, and "
            f"--tensor-parallel-size {num_workers} makes {num_workers} workers. Leave executor out, or "
            "set it to 'mp'."
        )
    return EXECUTOR_CLS[executor or ("uni" if num_workers == 1 else "mp")]


_offline_size: int | None = None


@contextmanager
def offline_data_parallel(size: int) -> Iterator[None]:
    """While active, configs are made for `size` ranks driven by one offline `LLM`.

    Raises:
        DwdpUnsupportedError: engines run in this process, where there is room for one rank only.
    """
    from vllm import envs

    global _offline_size
    if not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        raise DwdpUnsupportedError(
            "VLLM_ENABLE_V1_MULTIPROCESSING=0 runs the engine in this process, and "
            f"data_parallel_size={size} needs one process per rank. Unset it."
        )
    assert _offline_size is None
    _offline_size = size
    try:
        yield
    finally:
        _offline_size = None


def offline_size() -> int | None:
    """Ranks of the offline `LLM` that is being built, or None."""
    return _offline_size

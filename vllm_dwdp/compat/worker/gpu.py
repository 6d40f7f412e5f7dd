"""The CUDA build of vLLM: which device memory it counts as its own."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def requested_bytes(vllm_config: Any, total_bytes: int) -> int:
    """Return what vLLM asks of a device with `total_bytes`, weights held outside included."""
    utilization: float = vllm_config.cache_config.gpu_memory_utilization
    return math.ceil(total_bytes * utilization)


@contextmanager
def weights_held_outside(num_bytes: Callable[[], int]) -> Iterator[None]:
    """While active, vLLM takes `num_bytes` of its device memory budget as weights held outside.

    vLLM asks its model loader for them once, after the worker has its device and before it looks how
    much memory is free: they are part of the budget, and need not be free.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    stock = BaseModelLoader.get_external_weight_memory

    def get_external_weight_memory(self: Any, vllm_config: Any) -> int:
        return int(stock(self, vllm_config)) + num_bytes()

    BaseModelLoader.get_external_weight_memory = get_external_weight_memory
    try:
        yield
    finally:
        BaseModelLoader.get_external_weight_memory = stock

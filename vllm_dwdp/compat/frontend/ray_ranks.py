"""Ranks that Ray starts (`--data-parallel-backend ray`): vLLM's own actors, one for each rank.

vLLM reserves its accelerator's resource of Ray for each worker, and a CPU for each engine. Its CPU build
names no such resource, so stock vLLM finds none in any cluster: there a worker takes a CPU as well.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_dwdp.compat.frontend.backend import offline_size
from vllm_dwdp.compat.worker import independent
from vllm_dwdp.compat.worker.attributes import replaced
from vllm_dwdp.errors import DwdpConfigError, DwdpUnsupportedError

RAY = "ray"


def check_ray(args: Any) -> None:
    """Refuse a start by Ray where there is no Ray, or where an offline `LLM` starts its ranks itself.

    Raises:
        DwdpConfigError: Ray is not installed.
        DwdpUnsupportedError: the ranks are those of one offline `LLM`.
    """
    if args.data_parallel_backend != RAY:
        return
    if offline_size() is not None:
        raise DwdpUnsupportedError(
            "--data-parallel-backend ray is for vllm serve: an offline LLM starts its ranks itself. "
            "Leave it out."
        )
    if importlib.util.find_spec("ray") is None:
        raise DwdpConfigError(
            "--data-parallel-backend ray needs Ray, which is not installed. Install it on every host "
            "with `pip install ray` (the extra `ray`), or leave the flag out."
        )


def are_started(vllm_config: Any) -> bool:
    """Whether these are independent ranks that Ray starts."""
    is_ray = vllm_config.parallel_config.data_parallel_backend == RAY
    return is_ray and independent.is_planted(vllm_config)


def launching(stock: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `launch_core_engines`, in whose place Ray finds a resource on the CPU as well."""

    @functools.wraps(stock)
    @contextmanager
    def launch_core_engines(*args: Any, **kwargs: Any) -> Iterator[Any]:
        from vllm.platforms import current_platform

        resource = current_platform.ray_device_key or "CPU"
        with replaced(current_platform, ray_device_key=resource), stock(*args, **kwargs) as launch:
            yield launch

    return launch_core_engines

"""Refuses KV caches that together cannot fit into the memory of their machine, before loading.

On the CPU vLLM lets each worker look for itself how much memory is free. Workers that start together all
find it free, and the kernel kills one of them once their caches fill. What is refused is certain: of the
weights nothing is counted, and only ranks that are certain to be here.
"""

from typing import Any

import psutil

from vllm_dwdp.compat.frontend.ray_ranks import RAY
from vllm_dwdp.device.container import read_limits
from vllm_dwdp.distributed.launch import DwdpLaunch
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.logger import format_gib


def check_kv_caches(args: Any, cache_config: Any, launch: DwdpLaunch) -> None:
    """Check what the user says that each worker shall take of the memory of its machine.

    Args:
        args: vLLM's `EngineArgs`.
        cache_config: vLLM's, before its ranks divide what the user has left open.
        launch: the ranks of this front end.

    Raises:
        DwdpConfigError: it does not fit as often as there are workers.
    """
    if cache_config.num_gpu_blocks_override is not None:
        return
    if cache_config.kv_cache_memory_bytes is not None:
        each, option = (
            cache_config.kv_cache_memory_bytes,
            "VLLM_CPU_KVCACHE_SPACE or --kv-cache-memory-bytes",
        )
    elif args.gpu_memory_utilization != type(args).gpu_memory_utilization:
        each = int(args.gpu_memory_utilization * _least_node_bytes())
        option = f"--gpu-memory-utilization {args.gpu_memory_utilization}"
    else:
        return
    own = 0 if args.data_parallel_backend == RAY else launch.ranks.count
    sharing = launch.config.group_size if launch.config.shares_experts else 0
    _check(each, option, own, launch, read_limits().memory_bytes, "this container may use")
    machine = psutil.virtual_memory().total
    _check(each, option, max(own, sharing), launch, machine, "this machine has")


def _check(
    each: int, option: str, num_ranks: int, launch: DwdpLaunch, limit: int | None, has: str
) -> None:
    count = num_ranks * launch.tensor_parallel_size
    if limit is None or count * each <= limit:
        return
    raise DwdpConfigError(
        f"{option} is for each of the {count} workers of {num_ranks} ranks: {count} x "
        f"{format_gib(each)} are {format_gib(count * each)}, and {has} {format_gib(limit)}, for the "
        "weights too. The kernel would kill ranks while their KV caches fill. Give each less than "
        f"{format_gib(limit // count)}, or leave it out: then the ranks divide the memory."
    )


def _least_node_bytes() -> int:
    """Return the memory of the smallest node, of which a worker takes a share of its own node's."""
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    return min(int(get_memory_node_info(node).total_memory) for node in get_visible_memory_node())

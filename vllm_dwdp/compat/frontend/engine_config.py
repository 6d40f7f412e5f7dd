"""vLLM's config for independent ranks, made step by step in a front end.

Reads the options, lets stock vLLM build its config with our executor and worker named by dotted path,
finds the ranks of this front end and where they meet, and plants that into the config. Every refusal
comes before a process starts. Runs in each front-end process (the command line, each API server, `LLM`).
"""

from collections.abc import Callable
from typing import Any

from vllm_dwdp.compat.frontend import own_engines, startup, stat_logger
from vllm_dwdp.compat.frontend.backend import BACKEND, WORKER_CLS, executor_cls, offline_size
from vllm_dwdp.compat.frontend.expert_count import counted_in_parts
from vllm_dwdp.compat.frontend.host_memory import check_kv_caches
from vllm_dwdp.compat.frontend.model_refusals import refuse_unsupported_model
from vllm_dwdp.compat.frontend.ranks import (
    choose_endpoint,
    find_ranks,
    forget_ranks_at_exit,
    uncouple,
)
from vllm_dwdp.compat.frontend.ray_ranks import check_ray
from vllm_dwdp.compat.frontend.refusals import refuse_unsupported, refuse_unsupported_device
from vllm_dwdp.compat.worker import independent, remote_code
from vllm_dwdp.compat.worker.attributes import replaced
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.device import native
from vllm_dwdp.distributed.launch import DwdpLaunch
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)


def create_dwdp_config(args: Any, build_stock: Callable[[], Any], *, headless: bool) -> Any:
    """Make the config of a front end of independent ranks.

    Args:
        args: vLLM's `EngineArgs`.
        build_stock: what stock vLLM makes of them.
        headless: whether the engines of this process serve another front end.

    Raises:
        DwdpConfigError, DwdpUnsupportedError: a setting cannot be used; names it and the fix.
    """
    device = device_type()
    refuse_unsupported_device(device)
    _warn_where_untested(device)
    refuse_unsupported(args)
    check_ray(args)
    size = offline_size() or max(args.data_parallel_size, _spmd_size())
    config = DwdpConfig.parse((args.additional_config or {}).get(BACKEND, {}), size)
    if config.shares_experts and (config.mode == "prefetch" or device == "cuda"):
        native.library()
    if args.trust_remote_code:
        remote_code.install()
    vllm_config = _build(args, config, device, build_stock)
    refuse_unsupported_model(vllm_config, config, size)
    started = find_ranks(args, vllm_config, size, headless=headless)
    endpoint = choose_endpoint(args, config, started)
    num_workers = args.tensor_parallel_size
    launch = DwdpLaunch(
        config=config, ranks=started.span, endpoint=endpoint, tensor_parallel_size=num_workers
    )
    independent.plant(vllm_config, launch)
    uncouple(vllm_config.parallel_config, started)
    if device == "cpu":
        check_kv_caches(args, vllm_config.cache_config, launch)
    if device == "cpu" and args.gpu_memory_utilization == type(args).gpu_memory_utilization:
        # On the CPU this is a share of the host's memory, which the workers divide.
        vllm_config.cache_config.gpu_memory_utilization /= size * num_workers
    _install_front_end(launch)
    return vllm_config


def device_type() -> str:
    """Return the kind of device that this vLLM is built for: `cpu`, `cuda`, ..."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def _warn_where_untested(device: str) -> None:
    if device == "cuda":
        logger.warning(
            "DWDP on GPUs has been tested with a simulated driver only, never on hardware: compare "
            "its answers with stock vLLM's before you rely on it (docs/gpu.md)"
        )


def _spmd_size() -> int:
    from vllm import envs

    return int(envs.VLLM_DP_SIZE)


def _build(args: Any, config: DwdpConfig, device: str, build_stock: Callable[[], Any]) -> Any:
    """Stock vLLM's config with our executor and worker.

    What stays in `additional_config` is hashed into the torch.compile cache key: only what changes the
    compiled graph may stay, or every rank and every start would compile again.
    """
    hashed = {BACKEND: {"mode": config.mode if config.shares_experts else "replica"}}
    ours = replaced(
        args,
        distributed_executor_backend=executor_cls(
            config.executor, args.distributed_executor_backend, args.tensor_parallel_size
        ),
        worker_cls=WORKER_CLS[device],
        additional_config=dict(args.additional_config or {}) | hashed,
    )
    with ours, counted_in_parts():
        return build_stock()


def _install_front_end(launch: DwdpLaunch) -> None:
    """Prepare this process for the engines that it will start."""
    forget_ranks_at_exit(launch)
    startup.install()
    if offline_size() is None:
        own_engines.install()
        stat_logger.install(launch)

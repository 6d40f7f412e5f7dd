"""The one wrapper around stock vLLM: `EngineArgs.create_engine_config`.

It acts only when the backend is `dwdp`. Then it checks the arguments, lets stock vLLM build its
config with our executor and worker named by dotted path, and makes the result independent. Runs in
every front-end process (the command line, each API server, `LLM`).
"""

import atexit
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_dwdp.errors import DwdpConfigError, DwdpUnsupportedError
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)

BACKEND = "dwdp"
EXECUTOR_CLS = "vllm_dwdp.executor.executor.DwdpExecutor"
WORKER_CLS = {
    "cpu": "vllm_dwdp.executor.cpu_worker.DwdpCPUWorker",
    "cuda": "vllm_dwdp.executor.gpu_worker.DwdpGPUWorker",
}
"""The worker of each kind of device that vLLM may be built for."""

ENDPOINT_ENV = "DWDP_ENDPOINT"
"""Set by the process that starts the engines, read by the API servers that it spawns."""


def install() -> None:
    """Wrap `EngineArgs.create_engine_config` once; inert unless the backend is `dwdp`."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_dwdp.compat.frontend import admission

    admission.install(_is_chosen)
    stock = EngineArgs.create_engine_config
    if hasattr(stock, "dwdp_stock"):
        return

    @functools.wraps(stock)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_chosen(self):
            return stock(self, *args, **kwargs)
        return _create_dwdp_config(self, stock, *args, **kwargs)

    create_engine_config.dwdp_stock = stock  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def _is_chosen(args: Any) -> bool:
    return getattr(args, "distributed_executor_backend", None) in (BACKEND, EXECUTOR_CLS)


def _create_dwdp_config(args: Any, stock: Any, *pos: Any, **kwargs: Any) -> Any:

    from vllm_dwdp.compat.frontend import admission, startup, stats
    from vllm_dwdp.compat.worker import independent
    from vllm_dwdp.config import DwdpConfig, DwdpLaunch
    from vllm_dwdp.device import native

    device_type = _device_type()
    if device_type not in WORKER_CLS:
        raise DwdpUnsupportedError(
            f"--distributed-executor-backend dwdp runs on CPUs and NVIDIA GPUs, and this vLLM is "
            f"built for {device_type!r}. Use stock vLLM here."
        )
    if device_type == "cuda":
        logger.warning(
            "DWDP on GPUs has been tested with a simulated driver only, never on hardware: compare "
            "its answers with stock vLLM's before you rely on it (docs/gpu.md)"
        )
    refuse_unsupported(args)
    additional = dict(args.additional_config or {})
    size = offline_size() or max(args.data_parallel_size, _spmd_size())
    config = DwdpConfig.from_options(additional.pop(BACKEND, {}), size)
    if config.shares_experts and (config.mode == "prefetch" or device_type == "cuda"):
        native.library()
    # What stays in additional_config is hashed into the torch.compile cache key: only what
    # changes the compiled graph may stay, or every rank and every start would compile again.
    hashed = additional | {BACKEND: {"mode": config.mode if config.shares_experts else "replica"}}
    with _replaced(
        args,
        distributed_executor_backend=EXECUTOR_CLS,
        worker_cls=WORKER_CLS[device_type],
        additional_config=hashed,
    ):
        vllm_config = stock(args, *pos, **kwargs)

    refuse_unsupported_model(vllm_config, config)
    place = independent.find_place(args, vllm_config, size, headless=kwargs.get("headless", False))
    endpoint = _choose_endpoint(args, config, place)
    launch = DwdpLaunch(
        config=config,
        data_parallel_size=size,
        first_rank=place.first_rank,
        local_size=place.local_size,
        endpoint=endpoint,
    )
    independent.make_independent(vllm_config, launch, place)
    atexit.register(_forget_ranks, launch)
    if device_type == "cpu" and args.gpu_memory_utilization == type(args).gpu_memory_utilization:
        # On the CPU this is a share of the host's memory, which the ranks divide.
        vllm_config.cache_config.gpu_memory_utilization /= size
    stats.install(launch)
    startup.install()
    admission.explain_by(launch)
    return vllm_config


def _device_type() -> str:
    """What this vLLM is built for: `cpu`, `cuda`, ..."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def refuse_unsupported(args: Any) -> None:
    """Refuse arguments that DWDP cannot honour, naming the flag, its value and the fix.

    Raises:
        DwdpUnsupportedError: one of them is set.
    """
    for field, flag, neutral, reason in _REFUSED:
        value = getattr(args, field, neutral)
        if value != neutral and value is not None:
            shown = flag if value is True else f"{flag} {value}"
            raise DwdpUnsupportedError(
                f"{shown} cannot be used with --distributed-executor-backend dwdp: {reason}"
            )
    if args.worker_cls not in ("auto", *WORKER_CLS.values()):
        raise DwdpUnsupportedError(
            f"--worker-cls {args.worker_cls} cannot be used with --distributed-executor-backend "
            "dwdp, which brings its own worker. Leave it out."
        )


_REFUSED = (
    (
        "tensor_parallel_size",
        "--tensor-parallel-size",
        1,
        "a rank is one device. Use --data-parallel-size for more devices.",
    ),
    (
        "pipeline_parallel_size",
        "--pipeline-parallel-size",
        1,
        "a rank runs every layer. Use --data-parallel-size for more devices.",
    ),
    (
        "prefill_context_parallel_size",
        "--prefill-context-parallel-size",
        1,
        "a rank is one device. Leave it out.",
    ),
    (
        "decode_context_parallel_size",
        "--decode-context-parallel-size",
        1,
        "a rank is one device. Leave it out.",
    ),
    (
        "enable_expert_parallel",
        "--enable-expert-parallel",
        False,
        "it makes ranks wait for each other, which DWDP replaces. Leave it out.",
    ),
    (
        "enable_eplb",
        "--enable-eplb",
        False,
        "experts do not move between ranks. Leave it out; for redundancy set dwdp "
        '"experts_per_rank".',
    ),
    (
        "enable_elastic_ep",
        "--enable-elastic-ep",
        False,
        "the number of ranks of a group is fixed. Leave it out.",
    ),
    (
        "enable_dbo",
        "--enable-dbo",
        False,
        "two half-batches in flight would need two expert rings. Leave it out.",
    ),
    ("ubatch_size", "--ubatch-size", 0, "dual-batch overlap is not supported. Leave it out."),
    (
        "enable_sleep_mode",
        "--enable-sleep-mode",
        False,
        "peers read this rank's experts while it would sleep. Leave it out.",
    ),
    (
        "weight_transfer_config",
        "--weight-transfer-config",
        None,
        "shared experts cannot be replaced while they are served. Leave it out.",
    ),
    (
        "enable_lora",
        "--enable-lora",
        False,
        "LoRA wraps the expert layers that DWDP replaces. Merge the adapter into the checkpoint.",
    ),
    (
        "cpu_offload_gb",
        "--cpu-offload-gb",
        0,
        "experts already live in shared memory. Leave it out.",
    ),
    (
        "offload_group_size",
        "--offload-group-size",
        0,
        "experts already live in shared memory. Leave it out.",
    ),
    ("nnodes", "--nnodes", 1, "start each node's ranks with --data-parallel-start-rank instead."),
    (
        "data_parallel_backend",
        "--data-parallel-backend",
        "mp",
        "only processes started by vLLM itself were ever tried. Leave it out.",
    ),
)
"""(field of EngineArgs, flag, value that means "off", why and what to do)."""


def refuse_unsupported_model(vllm_config: Any, config: Any) -> None:
    """Refuse models that have no routed experts, or fewer than the group has ranks.

    Raises:
        DwdpUnsupportedError: the model has no experts.
        DwdpConfigError: the experts cannot be spread over the group as asked.
    """
    from vllm_dwdp.layout.placement import Placement

    model_config = vllm_config.model_config
    num_experts = model_config.get_num_experts()
    if num_experts < 1:
        raise DwdpUnsupportedError(
            f"{model_config.model} ({', '.join(model_config.architectures)}) has no routed experts "
            "that vLLM knows of, so there is nothing for --distributed-executor-backend dwdp to "
            "share. Leave the flag out: vLLM already runs the data-parallel ranks of such a model "
            "independently."
        )
    if not config.shares_experts:
        return
    if num_experts < config.group_size:
        raise DwdpConfigError(
            f"dwdp group_size={config.group_size} is larger than the {num_experts} experts of "
            f"{model_config.model}; choose at most {num_experts}."
        )
    Placement(
        num_experts=num_experts,
        group_size=config.group_size,
        experts_per_rank=config.experts_per_rank,
    )


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


def _spmd_size() -> int:
    from vllm import envs

    return int(envs.VLLM_DP_SIZE)


def _choose_endpoint(args: Any, config: Any, place: Any) -> str:
    """The given rendezvous, the one our parent made, or a new one."""
    from vllm_dwdp.config import make_abstract_endpoint
    from vllm_dwdp.distributed.endpoint import Endpoint

    if config.rendezvous is not None:
        _refuse_several_hosts_on_cpu(config.rendezvous)
        Endpoint.parse(config.rendezvous, config.group_size, config.rendezvous_secret_file)
        return str(config.rendezvous)
    if place.spmd_name is not None:
        return f"abstract:{place.spmd_name}"
    if place.started_one_by_one and config.shares_experts:
        raise DwdpConfigError(
            "dwdp rendezvous is missing: ranks that are started one by one "
            "(--data-parallel-rank, --data-parallel-start-rank, --headless) must be told where to "
            "meet. Give every rank the same folder, e.g. "
            '--additional-config \'{"dwdp": {"rendezvous": "unix:///run/user/1000/dwdp"}}\'.'
        )
    spawned_by_us = args._api_process_count > 1 and args._api_process_rank >= 0
    if spawned_by_us and ENDPOINT_ENV in os.environ:
        return os.environ[ENDPOINT_ENV]
    made = make_abstract_endpoint()
    os.environ[ENDPOINT_ENV] = made
    return made


def _refuse_several_hosts_on_cpu(rendezvous: str) -> None:
    from vllm.platforms import current_platform

    if rendezvous.startswith("tcp://") and current_platform.is_cpu():
        raise DwdpUnsupportedError(
            f"dwdp rendezvous={rendezvous!r} cannot be used on the host device (CPU): a host's "
            "memory cannot be mapped on another host, and only CUDA fabric handles travel over "
            "tcp://. Use unix:///folder for the ranks of one host."
        )


def _forget_ranks(launch: Any) -> None:
    """At exit: vLLM stops its workers with SIGKILL, so their sockets are ours to remove."""
    from vllm_dwdp.distributed.endpoint import Endpoint

    endpoint = Endpoint.of(launch)
    for engine in range(launch.local_size):
        rank = launch.rank(engine)
        endpoint.forget_dead(launch.group(rank), launch.dwdp_rank(rank))


@contextmanager
def _replaced(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes for the duration of a call."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)

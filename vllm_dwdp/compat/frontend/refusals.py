"""What DWDP cannot honour, refused before any process starts: the flag, its value and the fix."""

from typing import Any

from vllm_dwdp.compat.frontend.backend import WORKER_CLS
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpConfigError, DwdpUnsupportedError
from vllm_dwdp.layout.placement import Placement

REFUSED = (
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


def refuse_unsupported_device(device_type: str) -> None:
    """Refuse a vLLM that is built for a device without an implementation here.

    Raises:
        DwdpUnsupportedError: it is.
    """
    if device_type not in WORKER_CLS:
        raise DwdpUnsupportedError(
            f"--distributed-executor-backend dwdp runs on CPUs and NVIDIA GPUs, and this vLLM is "
            f"built for {device_type!r}. Use stock vLLM here."
        )


def refuse_unsupported(args: Any) -> None:
    """Refuse arguments that DWDP cannot honour, naming the flag, its value and the fix.

    Raises:
        DwdpUnsupportedError: one of them is set.
    """
    for field, flag, neutral, reason in REFUSED:
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


def refuse_unsupported_model(vllm_config: Any, config: DwdpConfig) -> None:
    """Refuse models that have no routed experts, or fewer than the group has ranks.

    Raises:
        DwdpUnsupportedError: the model has no experts.
        DwdpConfigError: the experts cannot be spread over the group as asked.
    """
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


def refuse_several_hosts_on_cpu(rendezvous: str) -> None:
    """Refuse an endpoint that spans hosts where ranks share host memory.

    Raises:
        DwdpUnsupportedError: it does.
    """
    from vllm.platforms import current_platform

    if rendezvous.startswith("tcp://") and current_platform.is_cpu():
        raise DwdpUnsupportedError(
            f"dwdp rendezvous={rendezvous!r} cannot be used on the host device (CPU): a host's "
            "memory cannot be mapped on another host, and only CUDA fabric handles travel over "
            "tcp://. Use unix:///folder for the ranks of one host."
        )

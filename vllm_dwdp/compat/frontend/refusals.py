"""What DWDP cannot honour, refused before any process starts: the flag, its value and the fix."""

from collections.abc import Iterator
from typing import Any

from vllm_dwdp.compat.frontend.backend import WORKER_CLS
from vllm_dwdp.errors import DwdpUnsupportedError

DECODE_BACKEND = "decode_backend"
"""Key of `additional_config` that chooses a specialised decode kernel (vLLM 0.33)."""

REFUSED = (
    (
        "pipeline_parallel_size",
        "--pipeline-parallel-size",
        1,
        "a rank runs every layer. Use --tensor-parallel-size or --data-parallel-size for more devices.",
    ),
    (
        "prefill_context_parallel_size",
        "--prefill-context-parallel-size",
        1,
        "a rank keeps all of a sequence on each of its devices. Leave it out.",
    ),
    (
        "decode_context_parallel_size",
        "--decode-context-parallel-size",
        1,
        "a rank keeps all of a sequence on each of its devices. Leave it out.",
    ),
    (
        "enable_expert_parallel",
        "--enable-expert-parallel",
        False,
        "it makes ranks wait for each other, which DWDP replaces. Leave it out, or give "
        "--no-enable-expert-parallel to a program that switches it on by itself.",
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
        "enable_fault_tolerance",
        "--enable-fault-tolerance",
        False,
        "it repairs what couples ranks, and these are not coupled: vllm-dwdp launch starts a rank "
        "that dies again. Leave it out.",
    ),
    (
        "enable_dbo",
        "--enable-dbo",
        False,
        "two half-batches in flight would need two expert rings. Leave it out.",
    ),
    (
        "monokernel",
        "--monokernel",
        False,
        "one kernel for a whole layer keeps the addresses of its experts, which change from layer to "
        "layer. Leave it out.",
    ),
    ("ubatch_size", "--ubatch-size", 0, "dual-batch overlap is not supported. Leave it out."),
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
)
"""(field of EngineArgs, flag, value that means "off", why and what to do)."""

REFUSED_VALUES = {
    "worker_cls": "every worker class but our own",
    "load_format": "`ipc_cache`; the tests run `auto`, and no other value",
    "weight_transfer_config": "backends that write past `load_weights`; the tests run one of their own",
}
"""Fields of EngineArgs that are refused with some values."""

WRITE_IN_PLACE = ("sparse_nccl", "sharded_rdt", "nccl_m2n", "modelexpress")
"""Backends of weight transfers that write into the tensors of kernels, not by `load_weights`."""


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
    """Refuse what DWDP cannot honour, all of it at once: flags, their values and the fixes.

    Raises:
        DwdpUnsupportedError: at least one of them is set.
    """
    found = [*_refused_flags(args), *_refused_values(args)]
    if not found:
        return
    shown = " and ".join(flag for flag, _ in found)
    one_by_one = " ".join(f"{flag}: {reason}" for flag, reason in found)
    reasons = found[0][1] if len(found) == 1 else one_by_one
    raise DwdpUnsupportedError(
        f"{shown} cannot be used with --distributed-executor-backend dwdp: {reasons}"
    )


def _refused_flags(args: Any) -> Iterator[tuple[str, str]]:
    """Each flag of `REFUSED` that is set, as it was given, and why it is refused."""
    for field, flag, neutral, reason in REFUSED:
        value = getattr(args, field, neutral)
        if value != neutral and value is not None:
            yield (flag if value is True else f"{flag} {value}"), reason


def _refused_values(args: Any) -> Iterator[tuple[str, str]]:
    """Each flag of which DWDP takes some values only, and what to do instead."""
    if args.worker_cls not in ("auto", *WORKER_CLS.values()):
        yield f"--worker-cls {args.worker_cls}", "DWDP brings its own worker. Leave it out."
    if args.load_format == "ipc_cache":
        yield (
            "--load-format ipc_cache",
            "it maps every expert of the weight cache, past the reader that a rank limits to its "
            "own. Leave it out: a rank that comes back takes its experts from its peers.",
        )
    transfer = _transfer_backend(args.weight_transfer_config)
    if transfer in WRITE_IN_PLACE:
        yield (
            f"--weight-transfer-config with backend {transfer!r}",
            "it writes into the tensors of a model, and those of the experts lie in the memory of "
            "several ranks. Use nccl or ipc, which give each rank the tensors of a checkpoint.",
        )
    backend = (args.additional_config or {}).get(DECODE_BACKEND)
    if backend is not None:
        yield (
            f"--additional-config {DECODE_BACKEND}={backend!r}",
            "such a kernel keeps the addresses of expert weights, which change from layer to layer. "
            f"Leave {DECODE_BACKEND} out.",
        )


def _transfer_backend(config: Any) -> str | None:
    """Return the backend of weight transfers, if there is one; vLLM takes a dictionary, too."""
    if isinstance(config, dict):
        return str(config.get("backend", "nccl"))
    return getattr(config, "backend", None)


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

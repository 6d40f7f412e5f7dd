"""How ranks and decode servers divide the memory of a machine whose CPU computes.

Each `vllm serve` would take its KV cache out of nearly all memory. Ranks divide that by themselves, and
know nothing of stock servers beside them: so launch gives all of them a share (vLLM's
`--gpu-memory-utilization`, which on the CPU is of the machine's memory), unless the user says how much.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

KV_SPACE_ENV = "VLLM_CPU_KVCACHE_SPACE"
UTILIZATION = "--gpu-memory-utilization"
OPTIONS = (UTILIZATION, "--kv-cache-memory-bytes")
"""Of vLLM, that say how much a server takes."""
USED = 0.9
"""Of the machine's memory, by all servers together."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of the machine's memory for each process that computes: weights and KV cache."""

    rank: float
    decode: float

    @staticmethod
    def arguments(share: float) -> tuple[str, ...]:
        """Return what tells a `vllm serve` its share."""
        return (UTILIZATION, f"{share:.4f}")


def divide_memory(
    rank_workers: int, decode_workers: Sequence[int], model_bytes: int, total_bytes: int
) -> Shares:
    """Give every process room for its weights, and divide the rest evenly.

    Ranks hold the weights once together, each decode server once in all its processes. Weights that
    leave no rest are not thought of: vLLM says then what does not fit.

    Args:
        rank_workers: processes of all ranks, which share one copy.
        decode_workers: processes of each decode server.
        model_bytes: of the weights; 0 where that is not known.
        total_bytes: of memory.
    """
    copies = 1 + len(decode_workers)
    weights = model_bytes / total_bytes
    if copies * weights >= USED:
        weights = 0.0
    rest = (USED - copies * weights) / (rank_workers + sum(decode_workers))
    of_decode = weights * len(decode_workers) / max(1, sum(decode_workers))
    return Shares(rank=rest + weights / rank_workers, decode=rest + of_decode)


def says_how_much(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether the user gave servers their memory."""
    names = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    return bool(environment.get(KV_SPACE_ENV)) or any(name in OPTIONS for name in names)

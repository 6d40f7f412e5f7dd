"""The question whether vLLM's KV cache leaves room for shards and slots: two ranks on one GPU.

vLLM takes what is missing of the device's free memory since the worker began for its own, so a rank here
counts its peer's memory as well. Ranks take turns, so that this is exact: both begin before either
loads, they size their caches one after the other, and neither allocates one before both are sized.

::

    rank 0   begin |       | load, meet | size |      | cache
    rank 1         | begin | load, meet |      | size | cache

Then each rank has found the shards and slots of both. `check_sizing` holds the numbers to it, and to the
same engine with other shards and slots, which cancels what torch and the kernels take.
"""

import tempfile
from pathlib import Path
from typing import Any

from gpu_checks.turns import TURNS_ENV, turns_of_process

MIB = 2**20
UTILIZATION = 0.15
TOLERANCE_BYTES = 64 * MIB
# Experts of 24 MiB: a shard of 768 MiB and slots of 192 MiB, so that a missing one shows.
LARGE: dict[str, Any] = {"hidden_size": 2048, "moe_intermediate_size": 2048, "num_hidden_layers": 8}
SHARING: dict[str, dict[str, Any]] = {
    "first": {"mode": "direct"},  # loads the kernels, which then take memory no more
    "direct": {"mode": "direct"},
    "prefetch": {"mode": "prefetch"},
    "redundant": {"mode": "direct", "experts_per_rank": 6},
}


def compare_sizes() -> str:
    """Run engines that differ in shards and slots only, and let vLLM size their caches."""
    from gpu_checks import engines

    arguments = engines.EAGER | engines.GPU_ARGS
    arguments |= {"kv_cache_memory_bytes": None, "gpu_memory_utilization": UTILIZATION}
    with tempfile.TemporaryDirectory() as folder:
        case = {
            "model": str(engines.make_model(Path(folder, "qwen3-moe"), **LARGE)),
            "engine_args": arguments,
            "num_ranks": 2,
            "begin_s": engines.ENGINES_S,
            "report": f"{__name__}:memory_of",
        }
        cases = [case | {"name": name, "dwdp": dwdp} for name, dwdp in SHARING.items()]
        results = engines.run_ranks(Path(folder), cases, {TURNS_ENV: folder})
    memory = {name: [result["memory"] for result in each] for name, each in results.items()}
    check_sizing(memory)
    caches = {name: f"{ranks[0]['cache'] / MIB:.0f} MiB" for name, ranks in memory.items()}
    return f"it does; rank 0's caches: {caches}"


def check_sizing(memory: dict[str, list[dict[str, int]]]) -> None:
    """Hold what `memory_of` found, by case and rank, to what must be left."""
    for name, ranks in memory.items():
        both = sum(each["shard"] + each["slots"] for each in ranks)
        for rank, each in enumerate(ranks):
            print(
                f"{name}, rank {rank}: {', '.join(f'{k} {v / MIB:.0f}' for k, v in each.items())} MiB"
            )
            where = (name, rank, each)
            assert each["consumed"] >= both, f"vLLM missed experts: {where}"
            assert 0 < each["cache"] <= each["budget"] - each["consumed"], where
        taken = max(each["free_at_start"] for each in ranks) - min(each["free"] for each in ranks)
        budgets = sum(each["budget"] for each in ranks)
        assert taken <= budgets, f"{name}: {taken} bytes taken, budgets of {budgets}"
    for name in ("prefetch", "redundant"):
        more = sum(each["shard"] + each["slots"] for each in memory[name])
        more -= sum(each["shard"] + each["slots"] for each in memory["direct"])
        assert more > 2 * TOLERANCE_BYTES, f"{name}: too little to be told from noise"
        for rank, (each, direct) in enumerate(zip(memory[name], memory["direct"], strict=True)):
            shrunk = direct["cache"] - each["cache"]
            assert abs(shrunk - more) <= TOLERANCE_BYTES, (
                f"{name}, rank {rank}: shards and slots take {more / MIB:.0f} MiB more than in direct "
                f"mode, the KV cache {shrunk / MIB:.0f} MiB less"
            )


def memory_of(worker: Any) -> dict[str, Any]:
    """Report, of a case, what the rank takes, bytes. Both ranks serve while it looks."""
    import torch

    turns = turns_of_process()
    turns.together()
    free = torch.cuda.mem_get_info(worker.device)[0]
    turns.together()
    status = worker.dwdp_status()
    return {
        "memory": {
            "free_at_start": worker.init_snapshot.free_memory,
            "free": free,
            "budget": worker.requested_memory,
            "consumed": worker.total_consumed,
            "cache": worker.available_kv_cache_memory_bytes,
            "shard": status["resident_expert_bytes"],
            "slots": status["slot_bytes"],
        }
    }

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

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2**20
TURNS_ENV = "DWDP_TEST_TURNS"
TURN_S = 200
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

    assert _turns is not None, f"{TURNS_ENV} is not set"
    _turns.together()
    free = torch.cuda.mem_get_info(worker.device)[0]
    _turns.together()
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


class Turns:
    """Points that every rank reaches, in the same order in each."""

    def __init__(self, folder: Path, rank: int, num_ranks: int = 2) -> None:
        self.folder, self.rank, self.num_ranks = folder, rank, num_ranks
        self._number = 0

    def together(self) -> None:
        """Wait until every rank is here."""
        self._number += 1
        (self.folder / f"turn{self._number}-{self.rank}").touch()
        deadline = time.monotonic() + TURN_S
        for rank in range(self.num_ranks):
            while not (self.folder / f"turn{self._number}-{rank}").exists():
                assert time.monotonic() < deadline, f"rank {rank} did not come in {TURN_S} s"
                time.sleep(0.01)

    def one_by_one(self, action: Callable[[], Any]) -> Any:
        """Let each rank act while the others wait."""
        result = None
        for rank in range(self.num_ranks):
            self.together()
            if rank == self.rank:
                result = action()
        self.together()
        return result


_turns: Turns | None = None


def take_turns(folder: Path, rank: int) -> None:
    """Let GPU workers of this process begin, and size their caches, in turn from now on."""
    from vllm_dwdp.executor.gpu_worker import DwdpGPUWorker

    global _turns
    turns = _turns = Turns(folder, rank)
    for name in ("init_device", "determine_available_memory"):
        stock = getattr(DwdpGPUWorker, name)

        @functools.wraps(stock)
        def in_turn(self: Any, stock: Callable[[Any], Any] = stock) -> Any:
            return turns.one_by_one(lambda: stock(self))

        setattr(DwdpGPUWorker, name, in_turn)

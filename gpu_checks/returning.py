"""The question whether a killed rank returns to its group inside vLLM without room for a second shard.

Two ranks share the GPU. One is killed; the rest of the device is taken, but a few GiB; it starts again
with a memory budget that does not fit into what is free, and fits once the shard that its peer kept for
it is counted: without that, vLLM refuses the start. Run as a module, this file is a rank, told over its
standard input what to do; its log is its standard error.
"""

import contextlib
import faulthandler
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_checks.ranks import Rank

START_S, ANSWER_S = 150, 60
LEFT_FREE_BYTES = 5 * 2**30
FREED_S = 20.0


def kill_and_return() -> str:
    """Kill rank 1 of two, start it again, and compare tokens, weights and memory."""
    from gpu_checks import engines, kv_sizing
    from vllm_dwdp.entrypoints.launch.ports import free_ports

    simulated = engines.is_simulated()
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        folder = Path(made)
        shape: dict[str, Any] = {} if simulated else kv_sizing.LARGE
        case: dict[str, Any] = {
            "model": str(engines.make_model(folder / "qwen3-moe", **shape)),
            "engine_args": engines.EAGER | ({} if simulated else engines.GPU_ARGS),
            "num_ranks": 2,
            "port": free_ports(1)[0],
            "dwdp": {"mode": "auto"},
        }
        if simulated:
            case["replace"] = engines.SIMULATED_MEMORY
        ranks = [start(folder, case, number, stack) for number in range(2)]
        first = [rank.answer(START_S) for rank in ranks]
        tokens, weights = first[0]["tokens"], first[0]["weights"]
        for answer in first:
            assert not answer["status"]["adopted"]
            assert (answer["tokens"], answer["weights"]) == (tokens, weights), answer["rank"]
        shard_bytes = first[1]["status"]["resident_expert_bytes"]
        (limit,) = {answer["status"]["direct_max_tokens"] for answer in first}

        ranks[1].process.kill()
        ranks[1].process.wait()
        assert ranks[0].ask("generate", ANSWER_S)["tokens"] == tokens
        if not simulated:
            stack.enter_context(little_left_free())
            case["engine_args"] |= {"kv_cache_memory_bytes": None}
        ranks[1] = start(folder, case | {"kept_bytes": shard_bytes}, 1, stack)
        again = ranks[1].answer(START_S)
        assert "DWDP rank 1 adopted" in (folder / "rank1-1.log").read_text()
        assert again["status"]["adopted"]
        assert again["status"]["direct_max_tokens"] == limit, "it runs with a limit of its own"
        assert (again["tokens"], again["weights"]) == (tokens, weights)
        if not simulated:
            check_memory(again["memory"], shard_bytes, again["status"]["slot_bytes"])
        for rank in ranks:
            assert rank.ask("generate", ANSWER_S)["tokens"] == tokens
        for rank in ranks:
            rank.ask("close", ANSWER_S)
            assert rank.process.wait(timeout=ANSWER_S) == 0
    return (
        f"{shard_bytes} bytes were adopted; the same weights and tokens, and as before steps of up to "
        f"{limit} tokens read in place"
    )


def start(folder: Path, case: dict[str, Any], number: int, stack: contextlib.ExitStack) -> Rank:
    """Start a rank, whose log is `rank<number>-<starts before>.log`; the stack ends it."""
    lives = len(list(folder.glob(f"rank{number}-*.log")))
    listing = folder / f"rank{number}-{lives}.json"
    listing.write_text(json.dumps(case))
    with listing.with_suffix(".log").open("wb") as log:
        rank = Rank(number, __name__, str(listing), str(number), log=log)
    stack.callback(rank.end)
    stack.push(lambda kind, *_: kind and print(listing.with_suffix(".log").read_text()[-4000:]))
    return rank


@contextlib.contextmanager
def little_left_free() -> Iterator[None]:
    """Take all of the device but a few GiB."""
    import torch

    torch.empty(1, device="cuda")
    deadline, free = time.monotonic() + FREED_S, -1
    while (before := free) != (free := torch.cuda.mem_get_info()[0]):
        assert time.monotonic() < deadline, f"free memory still changes: {before}, {free}"
        time.sleep(1.0)  # a killed process's memory returns when the driver gets to it
    taken = torch.empty(max(0, free - LEFT_FREE_BYTES), dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del taken
        torch.cuda.empty_cache()


def check_memory(memory: dict[str, int], shard_bytes: int, slot_bytes: int) -> None:
    """Check that the adopted shard was counted, as it had to be, and was not held twice.

    Args:
        memory: what `Life` measured, bytes.
        shard_bytes: of the adopted shard.
        slot_bytes: of the prefetch slots.
    """
    print({name: f"{value / 2**20:.0f} MiB" for name, value in memory.items()}, shard_bytes)
    wanted, free = memory["wanted"], memory["free_at_start"]
    assert shard_bytes > 0.1 * wanted, "the shard is too small for vLLM's margin to be exceeded"
    assert wanted > free, "the budget would have fitted anyway: this proves nothing"
    assert memory["budget"] <= wanted - shard_bytes, "the kept shard was not counted"
    assert memory["torch_peak_loading"] < shard_bytes / 2, "experts were held twice while loading"
    taken = free - memory["free_when_loaded"]
    assert taken < slot_bytes + shard_bytes / 2, f"loading took {taken} bytes of the device"


# --- the rank's process --------------------------------------------------------------------------


def just_too_much(kept_bytes: int) -> float:
    """Return a share of the device that exceeds what is free by less than what peers keep for us."""
    import torch

    torch.empty(1, device="cuda")  # the context, which vLLM has too when it looks
    free, total = torch.cuda.mem_get_info()
    return float((free + kept_bytes / 2) / total)


def watch_loading() -> dict[str, int]:
    """Let GPU workers write down from now on what loading a model took."""
    import torch

    from vllm_dwdp.executor.gpu_worker import DwdpGPUWorker

    found: dict[str, int] = {}
    stock = DwdpGPUWorker.load_model

    def load_model(self: Any, **kwargs: Any) -> None:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        stock(self, **kwargs)
        found["torch_peak_loading"] = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        found["free_when_loaded"] = torch.cuda.mem_get_info()[0]

    DwdpGPUWorker.load_model = load_model  # type: ignore[method-assign]
    return found


def memory_of(worker: Any, found: dict[str, int]) -> dict[str, int]:
    """Return the bytes that `check_memory` looks at."""
    utilization = worker.cache_config.gpu_memory_utilization
    return found | {
        "free_at_start": worker.init_snapshot.free_memory,
        "wanted": int(worker.init_snapshot.total_memory * utilization),
        "budget": worker.requested_memory,
    }


def main() -> None:
    """Start, say what is there, and obey commands."""
    faulthandler.enable()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM logs to standard output
    case, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    from gpu_checks import engines

    engines.prepare_process()
    engine_process = engines.engine_process()
    engine_process.take_place(case, rank)
    found: dict[str, int] = {}
    if not engines.is_simulated():
        found = watch_loading()
        if "kept_bytes" in case:
            case["engine_args"]["gpu_memory_utilization"] = just_too_much(case["kept_bytes"])
    replaced = contextlib.nullcontext()
    if "replace" in case:
        replaced = engine_process.replaced(case["replace"])
    with replaced:
        engine = engine_process.make_engine(case)
    worker = engine.model_executor.driver_worker.worker

    def generate() -> list[list[int]]:
        texts = enumerate(engine_process.PROMPTS)
        return [engine_process.generate(engine, number, text) for number, text in texts]

    def say(**content: Any) -> None:
        print(json.dumps({"ok": True, "rank": rank} | content), file=answers)

    say(
        tokens=generate(),
        weights=engine_process.digest_of_weights(worker),
        status=worker.dwdp_status(),
        memory={} if engines.is_simulated() else memory_of(worker, found),
    )
    for line in sys.stdin:
        if line.strip() == "close":
            engine_process.close_engine(engine)
            say()
            return
        say(tokens=generate())


if __name__ == "__main__":
    main()

"""The measurement behind the default of the option `executor`: one process per rank against two.

With asynchronous scheduling vLLM prepares a step while the one before it runs. A worker process does so
beside the engine's Python; in one process both share an interpreter. One rank with all its experts:
what peers do is no part of the question.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_checks import engines

NUM_TOKENS = 256
BATCHES = (1, 32)
ROUNDS = 5
EXECUTORS = ("uni", "mp", "uni", "mp")
"""In turn, and each twice: what the order of starts does shows as a difference between equals."""


def compare_executors() -> str:
    """Time decode steps of vLLM's real engine process, for each batch size."""
    import vllm_dwdp

    vllm_dwdp.register()
    figures: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = str(engines.make_model(Path(folder, "qwen3-moe")))
        for executor in EXECUTORS:
            times = step_ms(model, executor)
            said = ", ".join(f"{ms:.2f} ms at {batch}" for batch, ms in times.items())
            figures.setdefault(executor, []).append(said)
            print(f"{executor}: {said}", flush=True)
    return "median step: " + "; ".join(f"{name} {said}" for name, said in figures.items())


def step_ms(model: str, executor: str) -> dict[int, float]:
    """Milliseconds of a decode step, by sequences in the batch; the median of several rounds."""
    from vllm import LLM

    arguments: dict[str, Any] = engines.engine_args(engines.MODES["full"])
    arguments |= {} if engines.is_simulated() else {"async_scheduling": True}
    arguments |= {"distributed_executor_backend": "dwdp", "max_model_len": 1024}
    arguments |= {"additional_config": {"dwdp": {"executor": executor}}}
    llm = LLM(model, **arguments)
    try:
        return {batch: statistics.median(rounds(llm, batch)) for batch in BATCHES}
    finally:
        llm.llm_engine.engine_core.shutdown()


def rounds(llm: Any, batch: int) -> list[float]:
    """Milliseconds of a step in each round, after one that warms up."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    found = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        llm.generate(["hello"] * batch, params, use_tqdm=False)
        found.append((time.perf_counter() - started) * 1000 / NUM_TOKENS)
    return found[1:]

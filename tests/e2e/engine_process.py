"""One rank, or one stock engine, that runs a list of cases in one process and writes its tokens.

A vLLM engine spends most of its start importing; here the real engine core and the real worker run
in this process, so that a case costs seconds and every architecture can be compared. Started by
`matrix.py`, one process per rank, in vLLM's SPMD offline style.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS = [
    "The capital of France is",
    "a",
    "Independent ranks read each other's experts " * 6,
    "".join(chr(33 + 7 * i % 90) for i in range(150)),
]


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    rank = int(sys.argv[2])
    output = Path(sys.argv[3])
    with output.open("w") as file:
        for case in cases:
            if rank < case.get("num_ranks", 1):
                file.write(json.dumps(run_case(case, rank)) + "\n")
                file.flush()


def run_case(case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Build the engine, generate greedily one request at a time, and tear everything down."""
    num_ranks = case.get("num_ranks", 1)
    os.environ["VLLM_DP_SIZE"] = str(num_ranks)
    os.environ["VLLM_DP_RANK"] = os.environ["VLLM_DP_RANK_LOCAL"] = str(rank)
    os.environ["VLLM_DP_MASTER_PORT"] = str(case["port"])
    started = time.monotonic()
    engine = make_engine(case)
    try:
        tokens = [generate(engine, index, text) for index, text in enumerate(PROMPTS)]
        worker = engine.model_executor.driver_worker.worker
        result: dict[str, Any] = {"name": case["name"], "rank": rank, "tokens": tokens}
        if num_ranks > 1:
            result["status"] = worker.dwdp_status()
        result["weights"] = digest_of_weights(worker)
        result["seconds"] = time.monotonic() - started
        return result
    finally:
        close_engine(engine)


def make_engine(case: dict[str, Any]) -> Any:
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    dwdp = case.get("num_ranks", 1) > 1
    args = EngineArgs(
        model=case["model"],
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=1,
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=64 * 2**20,
        distributed_executor_backend="dwdp" if dwdp else "uni",
        additional_config={"dwdp": case["dwdp"]} if dwdp else {},
        **case.get("engine_args", {}),
    )
    vllm_config = args.create_engine_config()
    return LLMEngine(
        vllm_config,
        executor_class=make_executor_class(dwdp),
        log_stats=False,
        multiprocess_mode=False,
    )


def make_executor_class(dwdp: bool) -> type:
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from vllm_dwdp.compat import independent

    class InProcessExecutor(UniProcExecutor):
        """The worker in this process; `DwdpExecutor` would start another one."""

        def _init_executor(self) -> None:
            if dwdp:
                independent.restore_model_config(self.vllm_config)
            super()._init_executor()

    return InProcessExecutor


def generate(engine: Any, index: int, text: str) -> list[int]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    engine.add_request(f"request-{index}", text, params)
    tokens: list[int] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
    return tokens


def digest_of_weights(worker: Any) -> dict[str, str]:
    """SHA-256 of every expert parameter as the kernels see it; remote bytes are really read.

    In prefetch mode each layer is brought into its slot first, as its forward would.
    """
    import hashlib

    import torch
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_dwdp.model_executor import ops

    digests = {}
    for module in worker.model_runner.get_model().modules():
        if not isinstance(module, RoutedExperts):
            continue
        position = getattr(module, "ring_position", None)
        dummy = torch.zeros(1)
        if position is not None:
            ops.wait_layer(dummy, position.ring, position.index)
        for name, parameter in module.named_parameters(recurse=False):
            content = parameter.data.contiguous().view(torch.uint8).numpy().tobytes()
            digests[f"{module.layer_name}.{name}"] = hashlib.sha256(content).hexdigest()
        if position is not None:
            ops.record_layer(dummy, position.ring, position.index)
    return digests


def close_engine(engine: Any) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = "1"
    main()

"""Real vLLM engines: two ranks that share GPU 0, and one stock engine whose tokens they must give.

Each rank is a process with an engine of its own in vLLM's SPMD style (`tests.e2e.engine_process`); run
as a module, this file is that process. Needs vLLM, on a machine without it the bundle of
`../shared/gpu`. Copies are late and poison their slots, so that a race would show in the tokens.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENGINES_S = 280

# Experts of 2.75 and 1.375 MiB: several pages of 2 MiB each, and most end within one.
CHECKPOINT = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
GPU_ARGS = {
    "attention_backend": "TRITON_ATTN",
    "moe_backend": "triton",
    "gpu_memory_utilization": 0.3,
    "dtype": "bfloat16",
    "seed": 0,
}
SIZES = [1, 2, 4, 8, 16, 32, 64]
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "full": {
        "enforce_eager": False,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4],
        },
    },
    "piecewise": {
        "enforce_eager": False,
        "compilation_config": {
            "mode": 3,
            "cudagraph_mode": "PIECEWISE",
            "cudagraph_capture_sizes": SIZES,
        },
    },
    "default": {
        "enforce_eager": False,
        "compilation_config": {"cudagraph_capture_sizes": SIZES},
    },
}


def compare_engines(mode: str) -> None:
    """Tokens and weights of both ranks equal those of a stock engine of the same mode.

    Args:
        mode: a key of `MODES`; with ", runner V1" on vLLM's older model runner.
    """
    from vllm_dwdp.testing.accelerator import SIMULATED_ENV
    from vllm_dwdp.testing.checkpoints import make_checkpoint

    name, _, runner = mode.partition(", ")
    environment = {
        "DWDP_DEBUG_POISON": "1",
        "DWDP_DEBUG_MAX_DELAY_US": "2000",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if runner == "runner V1":
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_checkpoint(Path(folder, "qwen3-moe"), "qwen3_moe", 8, **CHECKPOINT))
        simulated = os.environ.get(SIMULATED_ENV) == "1"
        common = {"model": model, "engine_args": MODES[name] | ({} if simulated else GPU_ARGS)}
        sharing: dict[str, Any] = common | {"num_ranks": 2}
        if simulated:
            sharing["replace"] = [
                "vllm_dwdp.executor.cpu_worker:DwdpCPUWorker.make_device",
                "tests.e2e.engine_process:make_simulated_device",
            ]
        cases = [common | {"name": "stock"}]
        cases += [
            sharing | {"name": "prefetch", "dwdp": {"mode": "prefetch"}},
            sharing | {"name": "direct", "dwdp": {"mode": "direct"}},
            sharing | {"name": "auto", "dwdp": {"mode": "auto", "direct_max_tokens": 8}},
        ]
        results = run_ranks(Path(folder), cases, environment)
    stock = results["stock"][0]
    for case in ("prefetch", "direct", "auto"):
        assert [result["rank"] for result in results[case]] == [0, 1]
        for result in results[case]:
            where = (mode, case, result["rank"])
            fetched = sum(result["status"]["fetched_bytes"].values())
            print(f"{where}: steps {result['status']['steps']}, fetched {fetched / 2**20:.0f} MiB")
            assert result["weights"] == stock["weights"], where
            assert result["tokens"] == stock["tokens"], (where, result["tokens"], stock["tokens"])
            assert (fetched > 0) == (case != "direct"), (where, fetched)


def run_ranks(
    folder: Path, cases: list[dict[str, Any]], environment: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Results of every case, by rank; a process that fails shows the end of its log."""
    for case in cases:
        case["port"] = free_port()
    listing = folder / "cases.json"
    listing.write_text(json.dumps(cases))
    processes = []
    for rank in range(2):
        log = folder / f"rank{rank}.log"
        with log.open("wb") as file:
            command = [sys.executable, "-m", "tests.gpu.engines", str(listing), str(rank)]
            process = subprocess.Popen(
                [*command, str(folder / f"{rank}.out")],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
            )
        processes.append((process, log))
    try:
        codes = [process.wait(timeout=ENGINES_S) for process, _ in processes]
    finally:
        for process, _ in processes:
            process.kill()
            process.wait()
    for code, (_, log) in zip(codes, processes, strict=True):
        assert code == 0, f"{log.name} ended with {code}:\n{log.read_text()[-8000:]}"
    results: dict[str, list[dict[str, Any]]] = {}
    for rank in range(2):
        for line in (folder / f"{rank}.out").read_text().splitlines():
            result = json.loads(line)
            results.setdefault(result["name"], []).append(result)
    return results


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def digest_of_weights(worker: Any) -> dict[str, str]:
    """SHA-256 of every expert parameter as kernels see it, wherever it lies.

    In a ring each layer is brought into its slot first, as its forward would.
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
        parameters = dict(module.named_parameters(recurse=False))
        tick = torch.zeros(1, device=next(iter(parameters.values())).device)
        if position is not None:
            ops.wait_layer(tick, position.ring, position.index)
        for name, parameter in parameters.items():
            content = parameter.data.contiguous().view(torch.uint8).cpu().numpy().tobytes()
            digests[f"{module.layer_name}.{name}"] = hashlib.sha256(content).hexdigest()
        if position is not None:
            ops.record_layer(tick, position.ring, position.index)
    return digests


def main() -> None:
    """One rank's process: the plugin may not be installed here, so it is registered by hand."""
    import vllm_dwdp
    from tests.e2e import engine_process

    vllm_dwdp.register()
    engine_process.digest_of_weights = digest_of_weights
    engine_process.main()


if __name__ == "__main__":
    main()

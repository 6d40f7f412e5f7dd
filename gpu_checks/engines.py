"""Questions about real vLLM engines: two ranks that share GPU 0, and a stock one to compare with.

Each rank is a process with an engine of its own in vLLM's SPMD style (`tests.e2e.engine_process`); run
as a module, this file is that process. Needs vLLM. Copies are late and poison their slots, so that a
race would show in the tokens.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_checks.asking import LIMIT_ENV
from gpu_checks.fake import SIMULATED_ENV
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.prefetch.mode_policy import MOST_DIRECT_TOKENS

ROOT = Path(__file__).parents[1]
ENGINE_PROCESS = "tests.e2e.engine_process"
ENGINES_S = float(os.environ.get(LIMIT_ENV, "300")) - 20
"""So that the logs of engines that hang are still shown."""

# Experts of 2.75 and 1.375 MiB: several pages of 2 MiB each, and most end within one.
CHECKPOINT = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 1408,
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
SIMULATED_MEMORY = [
    "vllm_dwdp.executor.cpu_worker:DwdpCPUWorker.make_device",
    f"{ENGINE_PROCESS}:make_simulated_device",
]
"""`replace` of a case: the CUDA device over the fake driver, under a CPU worker."""


@dataclass(frozen=True, kw_only=True)
class EngineMode:
    """How both the stock engine and the ranks run.

    Args:
        arguments: of the engine.
        environment: of its process.
        fp8: whether the experts are float8.
        num_layers: of the model.
        sharing: dwdp modes that are compared with the stock engine.
    """

    arguments: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    fp8: bool = False
    num_layers: int = 4
    sharing: tuple[str, ...] = ("prefetch", "direct", "auto")


EAGER = {"enforce_eager": True}
FULL = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4],
    },
}
PIECEWISE = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 3,
        "cudagraph_mode": "PIECEWISE",
        "cudagraph_capture_sizes": SIZES,
    },
}
MODES: dict[str, EngineMode] = {
    "eager": EngineMode(arguments=EAGER),
    "full": EngineMode(arguments=FULL),
    "piecewise": EngineMode(arguments=PIECEWISE),
    "default": EngineMode(
        arguments={
            "enforce_eager": False,
            "compilation_config": {"cudagraph_capture_sizes": SIZES},
        }
    ),
    "full_v1": EngineMode(arguments=FULL, environment={"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    "fp8": EngineMode(arguments=FULL, fp8=True, num_layers=3, sharing=("prefetch", "auto")),
    "async": EngineMode(
        arguments=FULL | {"async_scheduling": True, "max_num_seqs": 4},
        sharing=("prefetch", "auto"),
    ),
    "drafter": EngineMode(
        arguments=EAGER
        | {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 3}},
        sharing=("prefetch", "auto"),
    ),
    "auto_default": EngineMode(arguments=FULL, sharing=("auto_default",)),
}
SHARING = {
    "prefetch": {"mode": "prefetch"},
    "direct": {"mode": "direct"},
    "auto": {"mode": "auto", "direct_max_tokens": 8},
    "auto_default": {"mode": "auto"},
}


def is_simulated() -> bool:
    """Return whether engines run on the CPU, over the fake driver."""
    return os.environ.get(SIMULATED_ENV) == "1"


def engine_process() -> Any:
    """Import the module that runs an engine in this process, which the end-to-end tests share."""
    return importlib.import_module(ENGINE_PROCESS)


def stock_generates() -> str:
    """Generate tokens with a small model, eagerly and in graphs."""
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_model(Path(folder, "qwen3-moe")))
        modes = ("eager",) if is_simulated() else ("eager", "full")
        cases = [
            {"name": mode, "model": model, "engine_args": engine_args(MODES[mode])}
            for mode in modes
        ]
        results = run_ranks(Path(folder), cases, {}, num_ranks=1)
    tokens = [results[mode][0]["tokens"] for mode in modes]
    assert all(tokens[0]), tokens
    num_tokens = sum(map(len, tokens[0]))
    are_equal = tokens[0] == tokens[-1]
    return f"{num_tokens} tokens, {', '.join(modes)}: {'the same' if are_equal else 'not the same'}"


def compare_engines(name: str) -> str:
    """Compare both ranks' tokens and weights with the stock engine's, and check what really ran."""
    mode = MODES[name]
    environment = {"DWDP_DEBUG_POISON": "1", "DWDP_DEBUG_MAX_DELAY_US": "2000"} | mode.environment
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "model": str(
                make_model(
                    Path(folder, "qwen3-moe"), fp8=mode.fp8, num_hidden_layers=mode.num_layers
                )
            ),
            "engine_args": engine_args(mode),
            "report": f"{__name__}:what_ran",
        }
        if name == "drafter":
            speculation = mode.arguments["speculative_config"] | {
                "model": str(make_model(Path(folder, "drafter"), num_hidden_layers=2, seed=1))
            }
            common["engine_args"] |= {"speculative_config": speculation}
        sharing = common | {"num_ranks": 2, "begin_s": ENGINES_S}
        if is_simulated():
            sharing["replace"] = SIMULATED_MEMORY
        cases = [common | {"name": "stock"}]
        cases += [sharing | {"name": each, "dwdp": SHARING[each]} for each in mode.sharing]
        results = run_ranks(Path(folder), cases, environment)
    stock, said = results["stock"][0], []
    for case in mode.sharing:
        assert [result["rank"] for result in results[case]] == [0, 1]
        for result in results[case]:
            where = (name, case, result["rank"])
            fetched = sum(result["status"]["fetched_bytes"].values())
            said.append(f"{case} {result['rank']}: {fetched / 2**20:.0f} MiB fetched")
            assert result["weights"] == stock["weights"], where
            assert result["tokens"] == stock["tokens"], (where, result["tokens"], stock["tokens"])
            steps = result["status"]["steps"]
            assert (fetched > 0) == (steps.get("prefetch", 0) > 0), (where, fetched, steps)
            if case == "auto_default":
                said.append(check_default(result["status"]))
            else:
                assert (fetched > 0) == (case != "direct"), (where, fetched)
            check_what_ran(name, case, result["ran"])
        limits = {result["status"]["direct_max_tokens"] for result in results[case]}
        assert len(limits) == 1, f"{case}: the ranks of a group do not run with one limit, {limits}"
    return f"the same weights and tokens; {', '.join(said)}"


def check_default(status: dict[str, Any]) -> str:
    """Check what the policy chose by itself; whatever it measured, it has both ways and a limit."""
    limit, needed = status["direct_max_tokens"], status["break_even_tokens"]
    assert limit is not None and 0 <= limit <= MOST_DIRECT_TOKENS, status
    assert needed is not None and limit < needed, status
    assert status["slot_bytes"] > 0, status
    assert limit > 0 or not status["steps"].get("direct"), status
    return f"direct up to {limit} tokens, hidden from {needed}"


def engine_args(mode: EngineMode) -> dict[str, Any]:
    """Return the arguments of an engine of this mode, here."""
    return mode.arguments | ({} if is_simulated() else GPU_ARGS)


def make_model(folder: Path, *, fp8: bool = False, **overrides: Any) -> Path:
    """Make a small qwen3_moe."""
    from gpu_checks.checkpoints import make_checkpoint
    from gpu_checks.quantised import make_quantised_checkpoint

    shape = CHECKPOINT | overrides
    if fp8:
        return make_quantised_checkpoint(folder, "fp8_block", 8, **shape)
    return make_checkpoint(folder, "qwen3_moe", 8, **shape)


def what_ran(worker: Any) -> dict[str, Any]:
    """Report, of a case, what must not have been left out silently."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    group = getattr(worker, "expert_group", None)
    rings = group.views.rings if group is not None else None
    return {
        "ran": {
            "async": bool(worker.vllm_config.scheduler_config.async_scheduling),
            "rings": [len(ring.batches) for ring in rings.rings] if rings else [],
            "experts": sorted(
                {
                    type(module.quant_method).__name__
                    for module in worker.model_runner.get_model().modules()
                    if isinstance(module, RoutedExperts)
                }
            ),
        }
    }


def check_what_ran(name: str, case: str, ran: dict[str, Any]) -> None:
    """Fail if the mode was not what its name says: equal tokens would prove something else."""
    layers = [MODES[name].num_layers] + ([2] if name == "drafter" else [])
    assert ran["rings"] == (layers if case != "direct" else []), ran
    method = "Fp8MoEMethod" if MODES[name].fp8 else "UnquantizedFusedMoEMethod"
    assert len(ran["experts"]) == 1 and ran["experts"][0].endswith(method), ran
    if name == "async":
        assert ran["async"], "vLLM turned asynchronous scheduling off"


def run_ranks(
    folder: Path, cases: list[dict[str, Any]], environment: dict[str, str], num_ranks: int = 2
) -> dict[str, list[dict[str, Any]]]:
    """Run every case and return its results by rank; a failure shows the end of its log."""
    for case, port in zip(cases, free_ports(len(cases)), strict=True):
        case["port"] = port
    listing = folder / "cases.json"
    listing.write_text(json.dumps(cases))
    processes = []
    for rank in range(num_ranks):
        log = folder / f"rank{rank}.log"
        with log.open("wb") as file:
            command = [sys.executable, "-m", __name__, str(listing), str(rank)]
            process = subprocess.Popen(
                [*command, str(folder / f"{rank}.out")],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
            )
        processes.append((process, log))
    deadline = time.monotonic() + ENGINES_S
    while any(process.poll() is None for process, _ in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process, _ in processes:
        process.kill()
    for process, log in processes:
        if code := process.wait():
            print(log.read_text()[-8000:])
            raise AssertionError(
                f"{log.stem} ended with {code} within {ENGINES_S:.0f} s: see its log"
            )
    results: dict[str, list[dict[str, Any]]] = {}
    for rank in range(num_ranks):
        for line in (folder / f"{rank}.out").read_text().splitlines():
            result = json.loads(line)
            results.setdefault(result["name"], []).append(result)
    return results


def dual_batch_overlap() -> str:
    """Ask the front end for it, before anything starts."""
    import vllm_dwdp
    from vllm_dwdp.errors import DwdpUnsupportedError

    vllm_dwdp.register()
    from vllm import EngineArgs

    with tempfile.TemporaryDirectory() as folder:
        args = EngineArgs(
            model=str(make_model(Path(folder, "qwen3-moe"), num_hidden_layers=1)),
            distributed_executor_backend="dwdp",
            data_parallel_size=2,
            enable_dbo=True,
        )
        refusal = ""
        try:
            args.create_engine_config()
        except DwdpUnsupportedError as error:
            refusal = str(error)
    assert "--enable-dbo" in refusal, refusal or "dual-batch overlap was accepted"
    return f"refused: {refusal}"


# --- one rank's process --------------------------------------------------------------------------


def prepare_process() -> None:
    """Prepare for an engine: the plugin may not be installed here, so it is registered by hand."""
    import vllm_dwdp
    from gpu_checks import fp8_stand_in, turns

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    vllm_dwdp.register()
    if is_simulated():
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        fp8_stand_in.install()
    if turns.TURNS_ENV in os.environ:
        turns.take_turns(Path(os.environ[turns.TURNS_ENV]), int(sys.argv[2]))


def main() -> None:
    """Run one rank."""
    prepare_process()
    engine_process().main()


if __name__ == "__main__":
    main()

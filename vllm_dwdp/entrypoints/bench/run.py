"""`vllm-dwdp bench`: DWDP against its baselines on this machine, by vLLM's own serving benchmark.

Every deployment is started once and suspended (SIGSTOP) while another one is measured. Each round runs
every load on every deployment, one after the other (every second round in reverse order), so that a
ratio compares runs that are seconds apart; the first round warms up and is not counted. Ratios are
medians over rounds, with their spread.
"""

import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

import vllm_dwdp
from vllm_dwdp.entrypoints.bench.client import BenchClient
from vllm_dwdp.entrypoints.bench.deployments import (
    BASELINES,
    DWDP,
    Deployment,
    Setting,
    check_deployments,
    has_gpu,
    in_turn,
)
from vllm_dwdp.entrypoints.bench.machine import OtherWork, describe_machine
from vllm_dwdp.entrypoints.bench.result import BenchResult, Run
from vllm_dwdp.entrypoints.bench.starting import start
from vllm_dwdp.entrypoints.bench.traffic import (
    Load,
    Shape,
    StreamResult,
    figures,
    long_probe_load,
    make_loads,
    probe_load,
    read_stream,
)
from vllm_dwdp.planner.checked import real, whole
from vllm_dwdp.planner.checkpoint import read_config
from vllm_dwdp.planner.simulate import percentile

Say = Callable[[str], None]
SERVE_ARGUMENTS = ("--max-model-len", "2048", "--no-enable-prefix-caching")
SERVE_ARGUMENTS_CPU = ("--kv-cache-memory-bytes", str(256 * 2**20))


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure.

    Args:
        model: folder or name; None makes a small MoE checkpoint of random weights.
        num_ranks: of every deployment.
        baselines: names of `deployments.BASELINES`.
        rounds: counted rounds.
        shape: of the traffic.
        serve_arguments: further arguments of every `vllm serve`.
        warms_up: a first round that is not counted, and probes before those that count.
    """

    model: str | None
    num_ranks: int
    baselines: tuple[str, ...]
    rounds: int
    shape: Shape
    serve_arguments: tuple[str, ...] = ()
    warms_up: bool = True

    def __post_init__(self) -> None:
        whole("--rounds", self.rounds, 1)
        if self.model is not None and self.model.startswith((".", "/")):
            read_config(Path(self.model))
        whole("--ranks", self.num_ranks, 2)
        real("--seconds", self.shape.seconds, above=True)
        check_deployments("--baseline", self.baselines, BASELINES, self.num_ranks)

    def in_short(self) -> "BenchOptions":
        """Reduce to the smallest run that still shows everything."""
        return replace(
            self,
            num_ranks=2,
            baselines=(),
            rounds=1,
            shape=Shape(input_tokens=16, output_tokens=24, long_input_tokens=256, seconds=1.0),
            serve_arguments=("--enforce-eager", *self.serve_arguments),
            warms_up=False,
        )


def run_bench(
    options: BenchOptions, command: str, say: Say, keep: Callable[[BenchResult], None]
) -> BenchResult:
    """Start everything, measure, stop everything.

    Args:
        keep: is given the result before the servers are stopped, which may take long or be interrupted.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dwdp-bench-")))
        model = options.model or default_model()
        of_device = () if has_gpu() else SERVE_ARGUMENTS_CPU
        arguments = (*SERVE_ARGUMENTS, *of_device, *options.serve_arguments)
        setting = Setting(
            model=model, num_ranks=options.num_ranks, arguments=arguments, folder=folder
        )
        clients = [
            stack.enter_context(BenchClient(setting.cores(rank), folder / f"client-{rank}.log"))
            for rank in range(options.num_ranks)
        ]
        deployments = [start(stack, name, setting, say) for name in (DWDP, *options.baselines)]
        for client in clients:
            client.wait_until_ready()
        bench = _Bench(clients, model, folder, say)
        loads = bench.size_loads(deployments[0], options)
        runs = bench.measure(deployments, loads, options)
        result = BenchResult(
            machine=describe_machine(),
            command=command,
            versions=versions(),
            deployments={made.name: facts(made) for made in deployments},
            loads=tuple(loads),
            runs=tuple(runs),
        )
        keep(result)
        return result


class _Bench:
    """The clients and where their results go."""

    def __init__(self, clients: list[BenchClient], tokenizer: str, folder: Path, say: Say) -> None:
        self._clients = clients
        self._tokenizer = tokenizer
        self._folder = folder
        self._say = say
        self._num_runs = 0

    def size_loads(self, deployment: Deployment, options: BenchOptions) -> list[Load]:
        shape, num_ranks = options.shape, options.num_ranks
        rates = []
        for load in (probe_load(shape, num_ranks), long_probe_load(shape, num_ranks)):
            if options.warms_up:
                self.drive(deployment, load)
            results = self.drive(deployment, load)
            rates.append(statistics.mean(r.num_requests / r.duration_s for r in results.values()))
        self._say(f"a rank answers {rates[0]:.2f} requests/s, or {rates[1]:.2f} long prompts/s")
        return make_loads(shape, num_ranks, *rates)

    def measure(
        self, deployments: Sequence[Deployment], loads: Sequence[Load], options: BenchOptions
    ) -> list[Run]:
        runs = []
        for number in range(0 if options.warms_up else 1, options.rounds + 1):
            for load in loads:
                for deployment in in_turn(deployments, number):
                    run = self._run(deployment, load, number)
                    if number > 0:
                        runs.append(run)
                    self._say(
                        f"round {number or 'to warm up'}: {load.name}, {deployment.name}: "
                        f"{run.figures['tokens_per_s']:.0f} tokens/s, "
                        f"ITL P99 {run.figures['itl_p99_ms']:.1f} ms"
                    )
        return runs

    def _run(self, deployment: Deployment, load: Load, number: int) -> Run:
        clients = [psutil.Process(client.pid) for client in self._clients]
        others = OtherWork([*deployment.processes(), *clients])
        results = self.drive(deployment, load, seed=number)
        other_cores = others.cores()
        last = results[max(results)]
        longs = {
            rank: stream.is_long for rank, stream in enumerate(load.streams) if stream is not None
        }
        return Run(
            deployment=deployment.name,
            load=load.name,
            round=number,
            figures=figures(
                [results[rank] for rank, is_long in longs.items() if not is_long],
                [results[rank] for rank, is_long in longs.items() if is_long],
            ),
            last_rank_itl_p99_ms=1e3 * percentile(last.itl_s, 99),
            coverage=results[min(results)].duration_s / last.duration_s,
            other_cores=other_cores,
        )

    def drive(self, deployment: Deployment, load: Load, seed: int = 0) -> dict[int, StreamResult]:
        """Drive one load on one deployment; the others are suspended. Return the results by rank."""
        sent: dict[int, Path] = {}
        with deployment.running():
            for rank, stream in enumerate(load.streams):
                if stream is not None:
                    path = self._folder / f"run{self._num_runs}-{rank}.json"
                    sent[rank] = path
                    self._clients[rank].begin(
                        stream.arguments(
                            deployment.url(rank), self._tokenizer, path, 97 * seed + rank
                        )
                    )
            found = {
                rank: read_stream(self._clients[rank].finish(path)) for rank, path in sent.items()
            }
        self._num_runs += 1
        return found


def facts(deployment: Deployment) -> dict[str, Any]:
    """Describe a deployment that runs, for the result."""
    return {
        "commands": [shlex.join(command) for command in deployment.commands],
        "start_s": deployment.start_s,
        "memory_bytes": deployment.memory_bytes(),
    }


def default_model() -> str:
    """Make random weights, once: 6 layers, hidden 512, 32 experts of 256, 4 per token, bf16."""
    from vllm_dwdp.entrypoints.bench.checkpoints import make_checkpoint

    folder = Path(tempfile.gettempdir()) / f"dwdp-bench-model-{os.getuid()}"
    return str(
        make_checkpoint(
            folder,
            32,
            hidden_size=512,
            moe_intermediate_size=256,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            num_experts_per_tok=4,
        )
    )


def versions() -> dict[str, str]:
    """Name what was measured, and when."""
    import torch
    import vllm

    return {
        "vllm_dwdp": vllm_dwdp.__version__,
        "vllm": str(vllm.__version__),
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }

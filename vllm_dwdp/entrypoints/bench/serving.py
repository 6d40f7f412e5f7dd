"""`benchmarks/benchmark_serving.py`: `vllm bench serve`, deployment after deployment, in rounds.

Its flags are vLLM's own: vLLM's parser reads them, and they are passed on as they were given, but for
the server to ask, which this starts. In every round each deployment gets the same requests (`--seed` and
the number of the round draw them), every second round in reverse order, so that a ratio compares runs
that are seconds apart.
"""

import argparse
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from vllm_dwdp.entrypoints.bench.client import BenchClient
from vllm_dwdp.entrypoints.bench.deployments import (
    BASELINES,
    DEFAULT_BASELINES,
    DISAGGREGATED,
    DWDP,
    Deployment,
    Setting,
    check_deployments,
    has_gpu,
    in_turn,
)
from vllm_dwdp.entrypoints.bench.machine import OtherWork, describe_machine
from vllm_dwdp.entrypoints.bench.run import Say, default_model, facts, versions
from vllm_dwdp.entrypoints.bench.serving_result import ServingResult, ServingRun, figures_of
from vllm_dwdp.entrypoints.bench.starting import start
from vllm_dwdp.entrypoints.files import check_writable, refusing
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import whole

PROGRAM = "benchmark_serving.py"
RESULTS = Path("benchmarks/results")
PERCENTILES = ("50", "99")
"""Of times, in the table."""
_REFUSED = {
    "base_url": "--deployments starts the servers",
    "host": "--deployments starts the servers",
    "port": "--deployments starts the servers",
    "append_result": "all rounds of all deployments are one result",
}
"""Flags of vLLM's that say what this decides, and why."""
_PER_RUN = ("save_detailed", "plot_timeline", "plot_dataset_stats")
"""Flags with which vLLM's file of each run is kept, too, beside the result."""


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """What to measure.

    Args:
        deployments: names, the first is compared to all others.
        num_ranks: of every deployment.
        decode_servers, decode_arguments: of `disagg`, beside its ranks.
        rounds, warmup_rounds: that count, and that do not.
        serve_arguments: further arguments of every `vllm serve`.
        traffic: of `vllm bench serve`, as given.
        flags: the same, as vLLM's parser reads them.
        output: file for the result.
    """

    deployments: tuple[str, ...]
    num_ranks: int
    decode_servers: int
    decode_arguments: tuple[str, ...]
    rounds: int
    warmup_rounds: int
    serve_arguments: tuple[str, ...]
    traffic: tuple[str, ...]
    flags: dict[str, Any] = field(repr=False)
    output: Path

    def __post_init__(self) -> None:
        whole("--rounds", self.rounds, 1)
        whole("--warmup-rounds", self.warmup_rounds, 0)
        whole("--ranks", self.num_ranks, 2)
        whole("--decode-servers", self.decode_servers, 1)
        known = (DWDP, *BASELINES)
        if not self.deployments:
            raise DwdpConfigError(f"--deployments is empty; known are {', '.join(known)}.")
        check_deployments("--deployments", self.deployments, known, self.num_ranks)
        if len(set(self.deployments)) < len(self.deployments):
            raise DwdpConfigError(
                f"--deployments {','.join(self.deployments)} names one twice; name each once."
            )

    @property
    def keeps_runs(self) -> bool:
        """Whether vLLM's file of each run stays."""
        return any(self.flags[name] for name in _PER_RUN)

    def run_arguments(
        self, deployment: str, url: str, tokenizer: str, result: Path, number: int
    ) -> list[str]:
        """List the arguments of one `vllm bench serve`: what was given, and after it what is ours."""
        asked = self.flags["metric_percentiles"].split(",")
        percentiles = ",".join(dict.fromkeys([*PERCENTILES, *asked]))
        return [
            *self.traffic,
            *("--base-url", url, "--model", "m", "--served-model-name", "m"),
            *("--tokenizer", self.flags["tokenizer"] or tokenizer),
            *("--seed", str(self.flags["seed"] + number), "--metric-percentiles", percentiles),
            *("--label", self.flags["label"] or deployment, "--disable-tqdm"),
            *("--save-result", "--save-detailed"),
            *("--result-dir", str(result.parent), "--result-filename", result.name),
        ]


def parse(words: Sequence[str]) -> ServingOptions:
    """Read the command line; vLLM's parser reads what is not ours.

    Raises:
        DwdpConfigError: a flag that cannot be used here, or that no machine like this can follow.
        SystemExit: a flag that vLLM's parser refuses, or `--help`.
    """
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    ours = _our_flags()
    parser: Any = FlexibleArgumentParser(
        prog=PROGRAM,
        parents=[ours],
        description="vllm bench serve for several deployments of one model, which it starts, in turn.",
    )
    add_cli_args(parser)
    flags = vars(parser.parse_args(list(words)))
    for name, reason in _REFUSED.items():
        if flags[name] != parser.get_default(name):
            flag = f"--{name.replace('_', '-')}"
            raise DwdpConfigError(f"{flag} cannot be given to {PROGRAM}: {reason}. Leave it out.")
    own, traffic = ours.parse_known_args(words)
    return ServingOptions(
        deployments=tuple(filter(None, own.deployments.split(","))),
        num_ranks=own.ranks,
        decode_servers=own.decode_servers,
        decode_arguments=tuple(shlex.split(own.decode_args)),
        rounds=own.rounds,
        warmup_rounds=own.warmup_rounds,
        serve_arguments=tuple(shlex.split(own.serve_args)),
        traffic=tuple(traffic),
        flags=flags,
        output=_output(flags),
    )


def _our_flags() -> argparse.ArgumentParser:
    ours = argparse.ArgumentParser(add_help=False)
    group = ours.add_argument_group("deployments")
    known = ", ".join((DWDP, *BASELINES))
    group.add_argument(
        "--deployments",
        default=",".join((DWDP, *DEFAULT_BASELINES)),
        help=f"Of {known}, with commas between; the first is compared to the others.",
    )
    group.add_argument("--ranks", type=int, default=2, help="Of every deployment.")
    group.add_argument(
        "--decode-servers", type=int, default=1, help=f"Of {DISAGGREGATED}, beside its ranks."
    )
    group.add_argument(
        "--decode-args",
        default="",
        help='Of its decode servers, as "--tensor-parallel-size 4 ...".',
    )
    group.add_argument(
        "--serve-args", default="", help='Of every vllm serve, as "--max-model-len 8192 ...".'
    )
    group.add_argument("--rounds", type=int, default=3, help="Rounds that count.")
    group.add_argument("--warmup-rounds", type=int, default=1, help="Rounds before these.")
    return ours


def _output(flags: dict[str, Any]) -> Path:
    """Choose where the result goes, by vLLM's flags, and check it before minutes of measuring."""
    folder = Path(flags["result_dir"] or RESULTS)
    name = flags["result_filename"] or f"serving-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    with refusing("--result-dir", folder):
        folder.mkdir(parents=True, exist_ok=True)
    check_writable("--result-filename", folder / name)
    return folder / name


def run_serving(
    options: ServingOptions, command: str, say: Say, keep: Callable[[ServingResult], None]
) -> ServingResult:
    """Start everything, measure, stop everything.

    Args:
        keep: is given what there is after every run: the next one may fail.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dwdp-bench-")))
        setting = Setting(
            model=options.flags["model"] or default_model(),
            num_ranks=options.num_ranks,
            arguments=options.serve_arguments,
            folder=folder,
            one_url=True,
            decode_servers=options.decode_servers,
            decode_arguments=options.decode_arguments,
        )
        client = stack.enter_context(BenchClient(setting.all_cores, folder / "client.log"))
        client.wait_until_ready()
        bench = _Serving(options, setting, client, Stage(stack, setting, say), say)
        result = ServingResult(
            machine=describe_machine(),
            command=command,
            versions=versions(),
            model=setting.model,
            deployments={name: {} for name in options.deployments},
            runs=(),
        )
        for number in range(1 - options.warmup_rounds, options.rounds + 1):
            for name in in_turn(options.deployments, number):
                result = bench.run(result, name, number)
                if number > 0:
                    keep(result)
        return result


class Stage:
    """Who has the machine: one deployment at a time.

    On CPUs the others are there, suspended. Memory of a GPU is for one: there each is started anew.
    """

    def __init__(self, stack: ExitStack, setting: Setting, say: Say) -> None:
        self._stack, self._setting, self._say = stack, setting, say
        self._kept: dict[str, Deployment] = {}

    @contextmanager
    def holding(self, name: str) -> Iterator[Deployment]:
        """Let a deployment run meanwhile."""
        with ExitStack() as until_then:
            made = self._kept.get(name)
            if made is None:
                stack = until_then if has_gpu() else self._stack
                made = start(stack, name, self._setting, self._say)
            if not has_gpu():
                self._kept[name] = made
            with made.running():
                yield made


@dataclass(frozen=True)
class _Serving:
    options: ServingOptions
    setting: Setting
    client: BenchClient
    stage: Stage
    say: Say

    def run(self, result: ServingResult, name: str, number: int) -> ServingResult:
        """Measure a deployment in a round, and add what it showed; rounds below 1 only warm up."""
        file = self._file(name, number)
        with self.stage.holding(name) as deployment:
            ours = [*deployment.processes(), psutil.Process(self.client.pid)]
            others = OtherWork(ours)
            self.client.begin(
                self.options.run_arguments(name, deployment.url(), self.setting.model, file, number)
            )
            found = self.client.finish(file)
            other_cores = others.cores()
            known = facts(deployment) | {"num_devices": deployment.num_devices}
        figures = figures_of(found, deployment.num_devices)
        self.say(
            f"round {number if number > 0 else 'to warm up'}: {name}: "
            f"{figures.get('output_throughput', 0.0):.0f} output tokens/s"
        )
        if number < 1:
            return result.with_deployment(name, known)
        run = ServingRun(deployment=name, round=number, figures=figures, other_cores=other_cores)
        return result.with_deployment(name, known).with_run(run)

    def _file(self, name: str, number: int) -> Path:
        output = self.options.output
        if self.options.keeps_runs and number > 0:
            return output.with_name(f"{output.stem}.{name}.{number}.json")
        return self.setting.folder / f"{name}.{number}.json"

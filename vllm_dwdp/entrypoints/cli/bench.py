"""`vllm-dwdp bench` and `vllm-dwdp calibrate`."""

import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_dwdp.entrypoints.bench import run
from vllm_dwdp.entrypoints.bench.calibrate import calibrate_machine
from vllm_dwdp.entrypoints.bench.deployments import DEFAULT_BASELINES
from vllm_dwdp.entrypoints.bench.report import bench_pictures, default_output, show_result
from vllm_dwdp.entrypoints.bench.traffic import Shape
from vllm_dwdp.entrypoints.cli.options import AsJson, Png
from vllm_dwdp.entrypoints.files import check_writable, refusing, write_json
from vllm_dwdp.entrypoints.pictures.draw import PngFile
from vllm_dwdp.entrypoints.tables import print_json, progress, say


def bench(
    model: Annotated[
        str, typer.Option(help="As for vllm serve; empty makes a small one of random weights.")
    ] = "",
    ranks: Annotated[int, typer.Option(help="Of every deployment.")] = 2,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="replica, tp, stock, prefetch, dp-ep, disagg; repeat; or none."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds; one more warms up.")] = 3,
    seconds: Annotated[float, typer.Option(help="Of each run, about.")] = 4.0,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="Only dwdp, two ranks, one short round, eager: does it work? Ignores --ranks, "
            "--baseline, --rounds and --seconds.",
        ),
    ] = False,
    calibrate_to: Annotated[
        Path | None, typer.Option("--calibrate", help="Now a command of its own.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON; default: a new file in benchmarks/results/.")
    ] = None,
    serve_argument: Annotated[
        list[str] | None, typer.Option(help="Further argument of every vllm serve; repeat.")
    ] = None,
    as_json: AsJson = False,
    png: Png = None,
) -> None:
    """Measure DWDP against full replicas and tensor parallelism on this machine.

    Drives vllm bench serve on even and on skewed traffic (the first rank gets long prompts), below and
    at saturation, deployment after deployment in every round. Takes about 8 minutes on two cores.
    Exits 2 where a server or a benchmark fails, and says why.
    """
    if calibrate_to is not None:
        progress(
            "bench --calibrate is now vllm-dwdp calibrate; the flag goes with the next release."
        )
        calibrate(calibrate_to)
        return
    picture, command = PngFile(png), _command()
    options = run.BenchOptions(
        model=model or None,
        num_ranks=ranks,
        baselines=() if baseline == ["none"] else tuple(baseline or DEFAULT_BASELINES),
        rounds=rounds,
        shape=Shape(seconds=seconds),
        serve_arguments=tuple(serve_argument or ()),
    )
    options = options.in_short() if smoke else options
    file = _result_file(output)
    signal.signal(signal.SIGTERM, _end)  # so that the servers end with us
    result = run.run_bench(
        options, command, progress, lambda found: write_json("--output", file, found.as_dict())
    )
    picture.write(lambda: bench_pictures(result))
    if as_json:
        print_json(result.as_dict())
        return
    show_result(result)
    say(f"written to {file}; again: {command}")


def calibrate(
    file: Annotated[Path, typer.Argument(help="TOML to write; give it to plan as --hardware.")],
) -> None:
    """Measure one core of this machine, with a small model, as an entry for plan and simulate."""
    calibrate_machine(file, _command(), progress)
    say(f"plan and simulate read it: --hardware {file}")


def _command() -> str:
    return shlex.join(["vllm-dwdp", *sys.argv[1:]])


def _result_file(output: Path | None) -> Path:
    """Choose where the result goes, and check it before minutes of measuring."""
    file = output or default_output()
    if output is None:
        with refusing("--output (the default)", file):
            file.parent.mkdir(parents=True, exist_ok=True)
    check_writable("--output", file)
    return file


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)

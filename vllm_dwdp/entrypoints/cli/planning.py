"""The commands `plan`, `simulate` and `bench` of `vllm-dwdp`."""

import json
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from vllm_dwdp.entrypoints.cli.paper_report import show_paper
from vllm_dwdp.entrypoints.cli.simulation_report import SimulationReport
from vllm_dwdp.entrypoints.pictures.figures import Pictures, check_writable, refusing, write_json
from vllm_dwdp.entrypoints.tables import console, figure, say, show, text
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import MOST_OF_ANYTHING, MOST_RANKS, whole
from vllm_dwdp.planner.config_fields import read_config
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.disaggregated import Service
from vllm_dwdp.planner.hardware import find_hardware
from vllm_dwdp.planner.model_shape import shape_of
from vllm_dwdp.planner.plan import Line, make_plan

Model = Annotated[Path | None, typer.Option(help="A model folder, or its config.json.")]
Gpu = Annotated[
    str, typer.Option(help="h100, h200, b200, gb200, gb300, epyc-2core, or one of --hardware.")
]
HardwareFile = Annotated[
    Path | None, typer.Option("--hardware", help="TOML of further ones, or of bench --calibrate.")
]
ExpertDtype = Annotated[
    str,
    typer.Option(
        help="Of the routed experts; overrides the checkpoint's: bf16, fp8, int4, mxfp4, nvfp4, ..."
    ),
]
DenseDtype = Annotated[str, typer.Option(help="Of all other weights but the embeddings, likewise.")]
KvDtype = Annotated[str, typer.Option(help="Of the KV cache, likewise.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Html = Annotated[Path | None, typer.Option("--html", help="Write pictures to this HTML file.")]
Png = Annotated[Path | None, typer.Option("--png", help="Write pictures to this PNG file.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `vllm-dwdp`."""
    for command in (plan, simulate, bench):
        app.command()(command)


def plan(
    model: Model = None,
    gpu: Gpu = "gb200",
    ranks: Annotated[int, typer.Option(help="Ranks that share one copy.")] = 4,
    input_tokens: Annotated[int, typer.Option(help="Per request.")] = 8192,
    output_tokens: Annotated[int, typer.Option(help="Per request.")] = 1024,
    variation: Annotated[
        float,
        typer.Option(
            help="Standard deviation of a rank's tokens per step over their mean; near 0 where "
            "chunked prefill fills every step."
        ),
    ] = 0.2,
    max_num_batched_tokens: Annotated[int, typer.Option(help="vLLM's limit per step.")] = 16384,
    batch_size: Annotated[int, typer.Option(help="Sequences that decode together.")] = 64,
    experts_per_rank: Annotated[int, typer.Option(help="0: an even share.")] = 0,
    expert_dtype: ExpertDtype = "",
    dense_dtype: DenseDtype = "",
    kv_dtype: KvDtype = "",
    hardware: HardwareFile = None,
    as_json: AsJson = False,
    html: Html = None,
    png: Png = None,
) -> None:
    """Say whether DWDP pays off, from a config.json, before renting anything.

    Every figure is marked: "config" and "spec" are counted from the model's config and the data sheet,
    "calibrated" ones were measured by bench --calibrate, "default" ones rest on published efficiencies,
    "part default" ones on both, or on the assumptions that are printed last. In JSON a figure that there
    is none of has low and high null, and a reason.
    """
    from vllm_dwdp.entrypoints.pictures.planner import plan_pictures
    from vllm_dwdp.planner.estimates import Traffic

    pictures = Pictures(html=html, png=png)
    dtypes = Dtypes(experts=expert_dtype, dense=dense_dtype, kv_cache=kv_dtype)
    cost = _cost_model(model, gpu, ranks, dtypes, hardware, experts_per_rank)
    traffic = Traffic(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        variation=variation,
        max_num_batched_tokens=max_num_batched_tokens,
        batch_size=batch_size,
    )
    made = make_plan(cost, traffic)
    pictures.write(lambda: plan_pictures(cost, traffic))
    if as_json:
        lines = [line.as_dict() for line in made.lines]
        said = {"advice": made.advice, "assumptions": made.assumptions}
        print(json.dumps({"lines": lines} | said, indent=1))
        return
    topics = [line.topic for line in made.lines]
    rows = [
        ("" if topic == before else topic, line.quantity, _value(line), line.unit, line.origin)
        for topic, before, line in zip(topics, ["", *topics], made.lines, strict=False)
    ]
    title = f"{cost.shape.name} on {ranks} x {gpu} ({cost.hardware.source})"
    show(title, ("", "quantity", "value", "unit", "origin"), rows)
    say(*(f"- {sentence}" for sentence in made.advice))
    say("Assumed:", *(f"- {sentence}" for sentence in made.assumptions))


def _value(line: Line) -> str:
    if line.low is None or line.high is None:
        return line.reason
    return figure(line.low) if line.low == line.high else f"{line.low:.2f} - {line.high:.2f}"


def simulate(
    paper: Annotated[
        bool, typer.Option("--paper", help="Published figures beside the model's.")
    ] = False,
    model: Model = None,
    gpu: Gpu = "gb200",
    ranks: Annotated[int, typer.Option(help="Ranks that share one copy, 2 to 72.")] = 4,
    expert_dtype: ExpertDtype = "",
    dense_dtype: DenseDtype = "",
    kv_dtype: KvDtype = "",
    hardware: HardwareFile = None,
    requests: Annotated[int, typer.Option(help="Prompts in all.")] = 2000,
    rate: Annotated[float, typer.Option(help="Prompts per second over all ranks.")] = 10.0,
    input_tokens: Annotated[int, typer.Option(help="Longest prompt.")] = 8192,
    smallest_share: Annotated[float, typer.Option(help="Shortest prompt over the longest.")] = 0.8,
    trace: Annotated[
        Path | None,
        typer.Option(help='JSON lines {"arrival_s": ..., "input_tokens": ...} as traffic.'),
    ] = None,
    max_num_batched_tokens: Annotated[int, typer.Option(help="vLLM's limit.")] = 16384,
    routing_skew: Annotated[float, typer.Option(help="Busiest rank over the mean.")] = 1.1,
    slice_mib: Annotated[
        float, typer.Option(help="Of a copy; 0 copies a peer's share whole.")
    ] = 2.0,
    pull_order: Annotated[str, typer.Option(help="rotated or random.")] = "rotated",
    output_tokens: Annotated[int, typer.Option(help="Generated on separate servers.")] = 1024,
    tokens_per_user: Annotated[float, typer.Option(help="Per second, on those servers.")] = 50.0,
    seed: Annotated[int, typer.Option(help="Of the traffic.")] = 0,
    as_json: AsJson = False,
    html: Html = None,
    png: Png = None,
) -> None:
    """Replay prefill traffic on DEP in lockstep and on independent DWDP ranks.

    The last column is what both kinds of servers can do together, context servers that always have work
    and generation servers: it does not depend on the rate.
    """
    from vllm_dwdp.entrypoints.pictures.planner import ttft_pictures
    from vllm_dwdp.planner import simulate as simulator
    from vllm_dwdp.planner.traffic import poisson_traffic, read_trace

    pictures = Pictures(html=html, png=png)
    if paper:
        show_paper(pictures, as_json)
        return
    simulator.check_sizes(ranks, max_num_batched_tokens, routing_skew)
    whole("--seed", seed, -MOST_OF_ANYTHING, MOST_OF_ANYTHING)
    dtypes = Dtypes(experts=expert_dtype, dense=dense_dtype, kv_cache=kv_dtype)
    cost = _cost_model(model, gpu, ranks, dtypes, hardware)
    traffic = (
        read_trace(trace)
        if trace is not None
        else poisson_traffic(
            num_requests=requests,
            requests_per_s=rate,
            input_tokens=input_tokens,
            smallest_share=smallest_share,
            seed=seed,
        )
    )
    simulator.check_length(traffic, max_num_batched_tokens)
    report = SimulationReport(
        model=cost,
        requests=traffic,
        service=Service(
            input_tokens=sum(request.input_tokens for request in traffic) / len(traffic),
            output_tokens=output_tokens,
            tokens_per_user=tokens_per_user,
        ),
        max_tokens=max_num_batched_tokens,
        routing_skew=routing_skew,
        slice_mib=slice_mib,
        pulls=simulator.pulls_for(cost, slice_mib, pull_order),
    )
    pictures.write(lambda: ttft_pictures(cost, report.outcomes))
    if as_json:
        print(json.dumps(report.as_dict(), indent=1))
        return
    title = f"{cost.shape.name} on {ranks} x {gpu}, prefill, {report.origin} efficiencies"
    rows = [[text(value) for value in row.values()] for row in report.rows]
    show(title, report.headings, rows)
    say(*(f"- {sentence}" for sentence in report.warnings))
    say("Assumed:", *(f"- {sentence}" for sentence in report.assumptions))


def bench(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="As for vllm serve; empty makes a small one of random weights.")
    ] = "",
    ranks: Annotated[int, typer.Option(help="Of every deployment.")] = 2,
    baseline: Annotated[
        list[str] | None, typer.Option(help="replica, tp, stock, prefetch, dp-ep; repeat; or none.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds; one more warms up.")] = 3,
    seconds: Annotated[float, typer.Option(help="Of each run, about.")] = 4.0,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Only dwdp, two ranks, one short round, eager: does it work?"),
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Only measure this machine, with a model of its own, into this TOML for plan."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON; default: a new file in benchmarks/results/.")
    ] = None,
    serve_argument: Annotated[
        list[str] | None, typer.Option(help="Further argument of every vllm serve; repeat.")
    ] = None,
    as_json: AsJson = False,
    html: Html = None,
    png: Png = None,
) -> None:
    """Measure DWDP against full replicas and tensor parallelism on this machine.

    Drives vllm bench serve on even and on skewed traffic (the first rank gets long prompts), below and
    at saturation, deployment after deployment in every round. Takes about 8 minutes on two cores.
    """
    from vllm_dwdp.entrypoints.bench import run as benchmark
    from vllm_dwdp.entrypoints.bench.deployments import DEFAULT_BASELINES
    from vllm_dwdp.entrypoints.bench.report import bench_pictures, default_output, show_result

    pictures = Pictures(html=html, png=png)
    command = shlex.join(["vllm-dwdp", *sys.argv[1:]])
    if calibrate is not None:
        _refuse_beside(context, "--calibrate", ("calibrate",))
        from vllm_dwdp.entrypoints.bench.calibrate import calibrate_machine

        calibrate_machine(calibrate, command, _progress)
        say(f"plan and simulate read it: --hardware {calibrate}")
        return
    if smoke:
        more = ("smoke", "model", "output", "serve_argument", "as_json", "html", "png")
        _refuse_beside(context, "--smoke", more)
    options = benchmark.BenchOptions.of(
        model=model or None,
        num_ranks=ranks,
        baselines=() if baseline == ["none"] else tuple(baseline or DEFAULT_BASELINES),
        rounds=rounds,
        seconds=seconds,
        smoke=smoke,
        serve_arguments=tuple(serve_argument or ()),
    )
    place = _result_file(output, default_output())
    signal.signal(signal.SIGTERM, _end)  # so that the servers end with us
    result = benchmark.run_bench(
        options, command, _progress, lambda found: write_json("--output", place, found.as_dict())
    )
    pictures.write(lambda: bench_pictures(result))
    if as_json:
        print(json.dumps(result.as_dict(), indent=1))
        return
    show_result(result, console)
    say(f"written to {place}; again: {command}")


def _refuse_beside(context: typer.Context, option: str, allowed: Sequence[str]) -> None:
    """Refuse options that would be ignored.

    Raises:
        DwdpConfigError: names them.
    """
    ignored = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in allowed and source is not None and source.name == "COMMANDLINE":
            ignored.append(parameter.opts[0])
    if ignored:
        raise DwdpConfigError(f"{option} does not use {', '.join(ignored)}: leave it out.")


def _result_file(output: Path | None, default: Path) -> Path:
    """Where the result goes, checked before minutes of measuring."""
    if output is None:
        with refusing("--output (the default)", default):
            default.parent.mkdir(parents=True, exist_ok=True)
    place = output or default
    check_writable("--output", place)
    return place


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """What overrides the checkpoint's precision; empty where nothing does."""

    experts: str
    dense: str
    kv_cache: str


def _cost_model(
    model: Path | None,
    gpu: str,
    ranks: int,
    dtypes: Dtypes,
    hardware: Path | None,
    experts_per_rank: int = 0,
) -> CostModel:
    if model is None:
        raise DwdpConfigError("--model is missing: give a model folder or its config.json.")
    if ranks == 1:
        raise DwdpConfigError("--ranks is 1; it must be at least 2: one rank shares nothing.")
    whole("--ranks", ranks, 2, MOST_RANKS)
    shape = shape_of(
        read_config(model), dtypes.experts or None, dtypes.kv_cache or None, dtypes.dense or None
    )
    even = -(-shape.num_experts // ranks)
    if experts_per_rank:
        whole("--experts-per-rank", experts_per_rank, even, shape.num_experts)
    found = find_hardware(gpu, hardware)
    return CostModel(
        shape=shape,
        hardware=found,
        efficiency=found.efficiency,
        group_size=ranks,
        extra_experts=max(0, experts_per_rank - even),
    )


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

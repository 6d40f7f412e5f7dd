"""The commands `plan`, `simulate` and `bench` of `vllm-dwdp`."""

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_dwdp.entrypoints.paper_report import show_paper
from vllm_dwdp.entrypoints.pictures import Pictures, check_writable, write_json
from vllm_dwdp.entrypoints.tables import console, figure, show, text
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.hardware import find_hardware
from vllm_dwdp.planner.model_shape import read_config, shape_of

Model = Annotated[Path | None, typer.Option(help="A model folder, or its config.json.")]
Gpu = Annotated[
    str, typer.Option(help="h100, h200, b200, gb200, gb300, epyc-2core, or one of --hardware.")
]
HardwareFile = Annotated[
    Path | None, typer.Option("--hardware", help="TOML of further ones, or of bench --calibrate.")
]
ExpertDtype = Annotated[
    str, typer.Option(help="Overrides the checkpoint's: bf16, fp8, int4, mxfp4, nvfp4, ...")
]
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
    kv_dtype: KvDtype = "",
    hardware: HardwareFile = None,
    as_json: AsJson = False,
    html: Html = None,
    png: Png = None,
) -> None:
    """Say whether DWDP pays off, from a config.json, before renting anything.

    Every figure is marked: "config" and "spec" are counted from the model's config and the data sheet,
    "calibrated" ones were measured by bench --calibrate, "default" ones rest on published efficiencies.
    """
    from vllm_dwdp.entrypoints.pictures_planner import plan_pictures
    from vllm_dwdp.planner.estimates import Traffic
    from vllm_dwdp.planner.plan import make_plan

    pictures = Pictures(html=html, png=png)
    cost = _cost_model(model, gpu, ranks, expert_dtype, kv_dtype, hardware, experts_per_rank)
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
        print(json.dumps({"lines": lines, "advice": made.advice}, indent=1))
        return
    rows = [
        (
            line.topic if index == 0 or made.lines[index - 1].topic != line.topic else "",
            line.quantity,
            figure(line.low) if line.low == line.high else f"{line.low:.2f} - {line.high:.2f}",
            line.unit,
            line.origin,
        )
        for index, line in enumerate(made.lines)
    ]
    title = f"{cost.shape.name} on {ranks} x {gpu} ({cost.hardware.source})"
    show(title, ("", "quantity", "value", "unit", "origin"), rows)
    for sentence in made.advice:
        console.print(f"- {sentence}", soft_wrap=True)


def simulate(
    paper: Annotated[
        bool, typer.Option("--paper", help="Published figures beside the model's.")
    ] = False,
    model: Model = None,
    gpu: Gpu = "gb200",
    ranks: Annotated[int, typer.Option(help="Ranks that share one copy, 2 to 72.")] = 4,
    expert_dtype: ExpertDtype = "",
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
    """Replay prefill traffic on DEP in lockstep and on independent DWDP ranks."""
    from vllm_dwdp.entrypoints.pictures_planner import ttft_pictures
    from vllm_dwdp.planner import disaggregated
    from vllm_dwdp.planner.simulate import check_sizes, pulls_for, sweep
    from vllm_dwdp.planner.traffic import poisson_traffic, read_trace

    pictures = Pictures(html=html, png=png)
    if paper:
        show_paper(pictures, as_json)
        return
    check_sizes(ranks, max_num_batched_tokens, routing_skew)
    cost = _cost_model(model, gpu, ranks, expert_dtype, "", hardware)
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
    service = disaggregated.Service(
        input_tokens=sum(request.input_tokens for request in traffic) / len(traffic),
        output_tokens=output_tokens,
        tokens_per_user=tokens_per_user,
    )
    pulls = pulls_for(cost, slice_mib, pull_order)
    outcomes = dict(
        sweep(
            cost, traffic, max_tokens=max_num_batched_tokens, routing_skew=routing_skew, pulls=pulls
        )
    )
    pictures.write(lambda: ttft_pictures(cost, outcomes))
    rows: list[dict[str, Any]] = [
        {
            "deployment": name,
            "prompt_tokens_per_s_per_gpu": outcome.tokens_per_s,
            "busy": outcome.busy,
            "ttft_p50_s": outcome.percentile(50),
            "ttft_p99_s": outcome.percentile(99),
            "output_tokens_per_s_per_gpu": disaggregated.output_tokens_per_s(
                cost, service, outcome.tokens_per_s / outcome.busy
            ),
        }
        for name, outcome in outcomes.items()
    ]
    origin = cost.efficiency.origin()
    if as_json:
        print(json.dumps({"origin": origin, "rows": rows}, indent=1))
        return
    headings = (
        "",
        "prompt tokens/s/GPU",
        "busy",
        "TTFT P50, s",
        "TTFT P99, s",
        f"generated tokens/s/GPU at {tokens_per_user:g} per user, both kinds of servers busy",
    )
    title = f"{cost.shape.name} on {ranks} x {gpu}, prefill, {origin} efficiencies"
    show(title, headings, [[text(value) for value in row.values()] for row in rows])


def bench(
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
        bool, typer.Option("--smoke", help="Only dwdp, one short round, eager: does it work?")
    ] = False,
    calibrate: Annotated[
        Path | None, typer.Option(help="Only measure this machine, into this TOML for plan.")
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
    from vllm_dwdp.entrypoints import bench as benchmark
    from vllm_dwdp.entrypoints.bench_deployments import DEFAULT_BASELINES
    from vllm_dwdp.entrypoints.bench_report import bench_pictures, default_output, show_result

    pictures = Pictures(html=html, png=png)
    command = shlex.join(["vllm-dwdp", *sys.argv[1:]])
    if calibrate is not None:
        from vllm_dwdp.entrypoints.calibrate import calibrate_machine

        calibrate_machine(calibrate, command, _progress)
        console.print(f"plan and simulate read it: --hardware {calibrate}", soft_wrap=True)
        return
    options = benchmark.BenchOptions.of(
        model=model or None,
        num_ranks=ranks,
        baselines=() if baseline == ["none"] else tuple(baseline or DEFAULT_BASELINES),
        rounds=rounds,
        seconds=seconds,
        smoke=smoke,
        serve_arguments=tuple(serve_argument or ()),
    )
    if output is not None:
        check_writable("--output", output)
    place = output or default_output()
    signal.signal(signal.SIGTERM, _end)  # so that the servers end with us
    result = benchmark.run_bench(
        options, command, _progress, lambda found: write_json(place, found.as_dict())
    )
    pictures.write(lambda: bench_pictures(result))
    if as_json:
        print(json.dumps(result.as_dict(), indent=1))
        return
    show_result(result, console)
    console.print(f"written to {place}; again: {command}", soft_wrap=True)


def _cost_model(
    model: Path | None,
    gpu: str,
    ranks: int,
    expert_dtype: str,
    kv_dtype: str,
    hardware: Path | None,
    experts_per_rank: int = 0,
) -> CostModel:
    if model is None:
        raise DwdpConfigError("--model is missing: give a model folder or its config.json.")
    if ranks < 2:
        raise DwdpConfigError(f"--ranks {ranks} must be at least 2: one rank shares nothing.")
    shape = shape_of(read_config(model), expert_dtype or None, kv_dtype or None)
    even = -(-shape.num_experts // ranks)
    if experts_per_rank and not even <= experts_per_rank <= shape.num_experts:
        raise DwdpConfigError(
            f"--experts-per-rank {experts_per_rank} must lie between an even share, {even}, and all "
            f"{shape.num_experts} experts."
        )
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

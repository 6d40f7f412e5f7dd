"""The command `vllm-dwdp`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import vllm_dwdp
from vllm_dwdp.errors import DwdpConfigError, DwdpError

app = typer.Typer(
    help="Tools around vLLM's dwdp backend.", no_args_is_help=True, pretty_exceptions_enable=False
)
console = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def version() -> None:
    """Print the version."""
    console.print(vllm_dwdp.__version__)


@app.command()
def status(
    rendezvous: Annotated[str, typer.Argument(help="The ranks' meeting place, unix:///folder.")],
    as_json: AsJson = False,
) -> None:
    """Show every rank that meets in a folder: its mode, memory, peers and traffic.

    Exits 1 if a rank that was there does not answer.
    """
    from vllm_dwdp.entrypoints.status import find_ranks

    ranks = find_ranks(rendezvous)
    if as_json:
        print(json.dumps(ranks, indent=1))
    else:
        table = Table(title=f"ranks at {rendezvous}")
        for heading in ("group", "rank", "state", "pid", "held", "remote", "steps", "peers"):
            table.add_column(heading, justify="right")
        for entry in ranks:
            table.add_row(
                str(entry["group"]),
                str(entry["dwdp_rank"]),
                str(entry["state"]),
                str(entry.get("pid", "")),
                _mib(entry.get("resident_expert_bytes")),
                _mib(entry.get("remote_expert_bytes")),
                str(sum(entry.get("steps", {}).values())),
                " ".join(f"{peer}:{state}" for peer, state in entry.get("peers", {}).items()),
            )
        console.print(table)
    if not ranks or any(entry["state"] == "dead" for entry in ranks):
        raise typer.Exit(1)


@app.command()
def doctor(
    group_size: Annotated[int, typer.Option(min=1, help="Ranks that will share experts.")] = 2,
    expert_gib: Annotated[
        float, typer.Option(min=0.0, help="GiB of one full copy of the experts, if known.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Check this machine and say what to change. Exits 1 if something would stop a start."""
    from vllm_dwdp.entrypoints.doctor import examine

    findings = examine(group_size=group_size, expert_bytes=int(expert_gib * 2**30))
    if as_json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=1))
    else:
        table = Table(title="vllm-dwdp doctor")
        for heading in ("check", "verdict", "seen", "what to do"):
            table.add_column(heading)
        colours = {"ok": "green", "warning": "yellow", "problem": "red"}
        for finding in findings:
            verdict = f"[{colours[finding.verdict]}]{finding.verdict}[/]"
            table.add_row(finding.check, verdict, finding.seen, finding.advice)
        console.print(table)
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)


@app.command()
def plan(
    model: Annotated[Path, typer.Option(help="A model folder, or its config.json.")],
    gpu: Annotated[str, typer.Option(help="h100, h200, b200, gb200, gb300, or one of --hardware.")],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that share one copy.")] = 4,
    input_tokens: Annotated[int, typer.Option(help="Per request.")] = 8192,
    output_tokens: Annotated[int, typer.Option(help="Per request.")] = 1024,
    variation: Annotated[
        float, typer.Option(help="Standard deviation of a rank's tokens per step, over the mean.")
    ] = 0.2,
    max_num_batched_tokens: Annotated[int, typer.Option(help="vLLM's limit per step.")] = 16384,
    batch_size: Annotated[int, typer.Option(help="Sequences that decode together.")] = 64,
    experts_per_rank: Annotated[int, typer.Option(help="0: an even share.")] = 0,
    expert_dtype: Annotated[
        str, typer.Option(help="Overrides the checkpoint's: bf16, fp8, mxfp4, nvfp4.")
    ] = "",
    hardware: Annotated[
        Path | None, typer.Option(help="TOML file of further accelerators.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether DWDP pays off, from a config.json, before renting anything.

    Figures marked "default" rest on efficiencies that were published or guessed, not measured here.
    """
    from vllm_dwdp.planner.cost import CostModel
    from vllm_dwdp.planner.hardware import DEFAULT, find_hardware
    from vllm_dwdp.planner.model_shape import read_config, shape_of
    from vllm_dwdp.planner.plan import Traffic, make_plan

    shape = shape_of(read_config(model), expert_dtype or None)
    cost = CostModel(
        shape=shape,
        hardware=find_hardware(gpu, hardware),
        efficiency=DEFAULT,
        group_size=ranks,
        extra_experts=max(0, experts_per_rank - -(-shape.num_experts // ranks)),
    )
    made = make_plan(
        cost,
        Traffic(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            variation=variation,
            max_num_batched_tokens=max_num_batched_tokens,
            batch_size=batch_size,
        ),
    )
    if as_json:
        lines = [line.as_dict() for line in made.lines]
        print(json.dumps({"lines": lines, "advice": made.advice}, indent=1))
        return
    table = Table(title=f"{shape.name} on {ranks} x {gpu}")
    for heading in ("", "quantity", "value", "unit", "origin"):
        table.add_column(heading)
    for line in made.lines:
        value = _figure(line.low)
        if line.low != line.high:
            value = f"{line.low:.2f} - {line.high:.2f}"
        table.add_row(line.topic, line.quantity, value, line.unit, line.origin)
    console.print(table)
    for sentence in made.advice:
        console.print(f"- {sentence}", soft_wrap=True)


@app.command()
def simulate(
    paper: Annotated[
        bool, typer.Option("--paper", help="Published figures beside the model's.")
    ] = False,
    model: Annotated[Path | None, typer.Option(help="A model folder, or its config.json.")] = None,
    gpu: Annotated[str, typer.Option(help="As for plan.")] = "gb200",
    ranks: Annotated[int, typer.Option(min=2, help="Ranks that share one copy.")] = 4,
    expert_dtype: Annotated[str, typer.Option(help="As for plan.")] = "",
    requests: Annotated[int, typer.Option(help="Prompts in all.")] = 2000,
    rate: Annotated[float, typer.Option(help="Prompts per second over all ranks.")] = 10.0,
    input_tokens: Annotated[int, typer.Option(help="Longest prompt.")] = 8192,
    smallest_share: Annotated[float, typer.Option(help="Shortest prompt over the longest.")] = 0.8,
    trace: Annotated[
        Path | None, typer.Option(help="JSON lines instead of random traffic.")
    ] = None,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="vLLM's limit.")] = 16384,
    routing_skew: Annotated[float, typer.Option(min=1.0, help="Busiest rank over the mean.")] = 1.1,
    seed: Annotated[int, typer.Option(help="Of the traffic.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Replay prefill traffic on DEP in lockstep and on independent DWDP ranks."""
    if paper:
        _show_paper(as_json)
        return
    from vllm_dwdp.planner.cost import CostModel
    from vllm_dwdp.planner.hardware import DEFAULT, find_hardware
    from vllm_dwdp.planner.model_shape import read_config, shape_of
    from vllm_dwdp.planner.simulate import poisson_traffic, read_trace, sweep

    if model is None:
        raise DwdpConfigError("--model is missing: give a model folder or its config.json.")
    cost = CostModel(
        shape=shape_of(read_config(model), expert_dtype or None),
        hardware=find_hardware(gpu),
        efficiency=DEFAULT,
        group_size=ranks,
    )
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
    rows: list[dict[str, Any]] = [
        {
            "deployment": name,
            "tokens_per_s_per_gpu": outcome.tokens_per_s,
            "ttft_p50_s": outcome.percentile(50),
            "ttft_p99_s": outcome.percentile(99),
        }
        for name, outcome in sweep(
            cost, traffic, max_tokens=max_num_batched_tokens, routing_skew=routing_skew
        )
    ]
    if as_json:
        print(json.dumps({"origin": DEFAULT.origin, "rows": rows}, indent=1))
        return
    table = Table(title=f"{cost.shape.name} on {ranks} x {gpu}, prefill, default efficiencies")
    for heading in ("", "tokens/s/GPU", "TTFT P50, s", "TTFT P99, s"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["deployment"]),
            *(_figure(float(value)) for key, value in row.items() if key != "deployment"),
        )
    console.print(table)


def _show_paper(as_json: bool) -> None:
    from vllm_dwdp.planner.paper import NOT_MODELLED, TOLERANCE, paper_rows

    rows = paper_rows()
    if as_json:
        missing = [{"source": what, "reason": why} for what, why in NOT_MODELLED]
        print(json.dumps({"rows": [r.as_dict() for r in rows], "not_modelled": missing}, indent=1))
        return
    table = Table(title="published figures and the model's")
    for heading in ("source", "quantity", "published", "model", "error", "kind"):
        table.add_column(heading)
    for row in rows:
        colour = "green" if abs(row.error) <= TOLERANCE else "red"
        error = f"[{colour}]{100 * row.error:+.1f} %[/]"
        figures = (f"{row.published:g}", f"{row.model:.3g}", error)
        table.add_row(row.source, row.quantity, *figures, row.kind)
    console.print(table)
    within = sum(abs(row.error) <= TOLERANCE for row in rows)
    console.print(f"{within} of {len(rows)} rows within {100 * TOLERANCE:.0f} %. Not modelled:")
    for what, why in NOT_MODELLED:
        console.print(f"- {what}: {why}", soft_wrap=True)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def launch(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="As for vllm serve.")],
    ranks: Annotated[int, typer.Option(min=1, help="Servers that share one copy.")] = 2,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on.")] = 8000,
    logs: Annotated[Path, typer.Option(help="Folder for the logs.")] = Path("dwdp-logs"),
) -> None:
    """Serve MODEL on ranks that outlive each other, behind vllm-router.

    Every rank is its own vllm serve, restarted with back-off when it dies; a rank that comes back
    adopts its experts from the survivors. Further arguments go to every vllm serve.
    """
    from vllm_dwdp.entrypoints import launch as launcher

    arguments, additional_config = launcher.split_arguments(context.args)
    with launcher.meeting_folder() as rendezvous:
        plan = launcher.LaunchPlan(
            model=model,
            num_ranks=ranks,
            host=host,
            port=port,
            rank_ports=tuple(launcher.free_port() for _ in range(ranks)),
            rendezvous=rendezvous,
            arguments=arguments,
            additional_config=additional_config,
        )
        console.print(f"ranks meet at {rendezvous}; logs in {logs}/", soft_wrap=True)
        launcher.launch(plan, logs, lambda line: console.print(line, soft_wrap=True))


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _mib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**20:.0f} MiB"


def main() -> None:
    """Run the command; what we refuse is one line and exit status 2."""
    try:
        app()
    except DwdpError as error:
        print(f"vllm-dwdp: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""The command `vllm-dwdp`."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import vllm_dwdp
from vllm_dwdp.entrypoints.cli import planning
from vllm_dwdp.errors import DwdpError

app = typer.Typer(
    help="Tools around vLLM's dwdp backend.", no_args_is_help=True, pretty_exceptions_enable=False
)
console = Console(markup=False, emoji=False)
"""Prints what ranks and users wrote as it is: `[/models/x]` is a path."""
planning.register(app)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def version() -> None:
    """Print the version."""
    console.print(vllm_dwdp.__version__)


@app.command()
def status(
    rendezvous: Annotated[
        str, typer.Argument(help="The ranks' meeting place, unix:///folder or tcp://host:port.")
    ],
    as_json: AsJson = False,
    secret_file: Annotated[str, typer.Option(help="For tcp://: the shared secret.")] = "",
    group_size: Annotated[int, typer.Option(min=1, help="For tcp://: ranks of a group.")] = 1,
    groups: Annotated[int, typer.Option(min=1, help="For tcp://: groups.")] = 1,
) -> None:
    """Show every rank that meets there: its state, generation, memory, peers and last failure.

    Exits 1 if there is none, if one is dead (also if only its peers say so), or does not answer.
    """
    from vllm_dwdp.entrypoints.cli.status import find_ranks, needs_attention

    ranks = find_ranks(
        rendezvous, secret_file=secret_file or None, group_size=group_size, num_groups=groups
    )
    if as_json:
        print(json.dumps(ranks, indent=1))
    else:
        _print_ranks(rendezvous, ranks)
    if needs_attention(ranks):
        raise typer.Exit(1)


def _print_ranks(rendezvous: str, ranks: list[dict[str, Any]]) -> None:
    table = Table(title=f"ranks at {rendezvous}")
    headings = ("group", "rank", "state", "started", "pid", "held", "remote", "steps", "peers")
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for entry in ranks:
        table.add_row(
            str(entry["group"]),
            str(entry["dwdp_rank"]),
            str(entry["state"]),
            _clock(entry.get("generation", 0) / 1e9),
            str(entry.get("pid", "")),
            _mib(entry.get("resident_expert_bytes")),
            _mib(entry.get("remote_expert_bytes")),
            str(sum(entry.get("steps", {}).values())),
            " ".join(f"{peer}:{state}" for peer, state in entry.get("peers", {}).items()),
        )
    console.print(table)
    for entry in ranks:
        rank = f"rank {entry['dwdp_rank']} of group {entry['group']}"
        if entry.get("doing"):
            console.print(f"{rank} {entry['doing']}", highlight=False)
        if entry.get("last_failure"):
            when = _clock(entry.get("last_failure_at", 0.0))
            topic = f"{rank}, last failure {when}" if when else rank
            console.print(f"{topic}: {entry['last_failure']}", highlight=False)


def _clock(seconds: float) -> str:
    """A Unix time as the local date and time; empty for 0."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


@app.command()
def doctor(
    group_size: Annotated[int, typer.Option(min=1, help="Ranks that will share experts.")] = 2,
    expert_gib: Annotated[
        float, typer.Option(min=0.0, help="GiB of one full copy of the experts, if known.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Check this machine and say what to change. Exits 1 if something would stop a start."""
    from vllm_dwdp.entrypoints.doctor.checks import examine

    findings = examine(group_size=group_size, expert_bytes=int(expert_gib * 2**30))
    if as_json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=1))
    else:
        table = Table(title="vllm-dwdp doctor")
        for heading in ("check", "verdict", "seen", "what to do"):
            table.add_column(heading, overflow="fold")
        colours = {"ok": "green", "warning": "yellow", "problem": "red"}
        for finding in findings:
            verdict = Text(finding.verdict, style=colours[finding.verdict])
            table.add_row(finding.check, verdict, finding.seen, finding.advice)
        console.print(table)
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def launch(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="As for vllm serve.")],
    ranks: Annotated[int, typer.Option(min=1, help="Servers that share one copy.")] = 2,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 8000,
    logs: Annotated[Path, typer.Option(help="Folder for the logs.")] = Path("dwdp-logs"),
) -> None:
    """Serve MODEL on ranks that outlive each other, behind vllm-router.

    Every rank is its own vllm serve, restarted with back-off when it dies; a rank that comes back
    adopts its experts from the survivors. Further arguments go to every vllm serve.
    """
    from vllm_dwdp.entrypoints.launch import launcher
    from vllm_dwdp.entrypoints.launch.plan import LaunchPlan, split_arguments
    from vllm_dwdp.entrypoints.launch.ports import free_ports

    arguments, additional_config = split_arguments(context.args)
    with launcher.meeting_folder() as rendezvous:
        plan = LaunchPlan(
            model=model,
            num_ranks=ranks,
            host=host,
            port=port,
            rank_ports=tuple(free for free in free_ports(ranks + 1) if free != port)[:ranks],
            rendezvous=rendezvous,
            arguments=arguments,
            additional_config=additional_config,
        )
        meeting = plan.dwdp_options["rendezvous"]
        console.print(f"ranks meet at {meeting}; logs in {logs}/", soft_wrap=True)
        launcher.launch(plan, logs, lambda line: console.print(line, soft_wrap=True))


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

"""`vllm-dwdp launch`."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_dwdp.entrypoints.launch import launcher
from vllm_dwdp.entrypoints.launch.plan import LaunchPlan, split_arguments
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.tables import say


def launch(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="As for vllm serve.")],
    ranks: Annotated[int, typer.Option(min=1, help="Servers that share one copy.")] = 2,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 8000,
    control_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Port at which one control request (/pause, /reset_prefix_cache, ...) reaches every "
            "rank. [default: none]",
        ),
    ] = None,
    start_timeout: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Seconds within which a rank must serve, or it is started again. "
            "[default: join_timeout_s (600), 60, and 10 for each GB of the model on disk]",
        ),
    ] = None,
    logs: Annotated[Path, typer.Option(help="Folder for the logs.")] = Path("dwdp-logs"),
    fork_ranks: Annotated[
        bool,
        typer.Option(help="Import vLLM once and fork the ranks, instead of once per process."),
    ] = True,
    hold_experts: Annotated[
        bool, typer.Option(help="Keep the experts' memory for ranks that all die at once.")
    ] = True,
) -> None:
    """Serve MODEL on ranks that outlive each other, behind vllm-router.

    Every rank is its own vllm serve, restarted with back-off when it dies; a rank that comes back
    adopts its experts from the survivors. Further arguments go to every vllm serve.
    """
    arguments, additional_config = split_arguments(context.args)
    with launcher.meeting_folder() as rendezvous:
        plan = LaunchPlan(
            model=model,
            num_ranks=ranks,
            host=host,
            port=port,
            control_port=control_port,
            start_timeout_s=start_timeout,
            rank_ports=tuple(free_ports(ranks, {port, control_port})),
            rendezvous=rendezvous,
            arguments=arguments,
            additional_config=additional_config,
            forks_ranks=fork_ranks,
            holds_experts=hold_experts,
        )
        meeting = plan.dwdp_options["rendezvous"]
        say(f"ranks meet at {meeting}; logs in {logs}/")
        launcher.launch(plan, logs, say)

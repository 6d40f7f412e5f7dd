"""`vllm-dwdp launch`."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import psutil
import typer

from vllm_dwdp.entrypoints.doctor.gpus import count_gpus
from vllm_dwdp.entrypoints.launch import launcher
from vllm_dwdp.entrypoints.launch.deadlines import model_bytes
from vllm_dwdp.entrypoints.launch.disaggregation import (
    SIDE_CHANNEL_PORT_ENV,
    TENSOR_PARALLEL,
    Disaggregation,
    check_side_channel,
    check_url,
    devices_of,
    size_of,
    split_decode_arguments,
    take_transfer_config,
)
from vllm_dwdp.entrypoints.launch.memory import Shares, divide_memory, says_how_much
from vllm_dwdp.entrypoints.launch.plan import LaunchPlan, api_key, split_arguments
from vllm_dwdp.entrypoints.launch.ports import free_ports, free_ports_in_a_row
from vllm_dwdp.entrypoints.tables import say
from vllm_dwdp.errors import DwdpConfigError


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
    decode_servers: Annotated[
        int,
        typer.Option(
            min=0, help="Stock servers that decode; the ranks then compute prompts only (NIXL)."
        ),
    ] = 0,
    decode_args: Annotated[
        str, typer.Option(help="Further arguments of each of them, after those of all servers.")
    ] = "",
    decode_url: Annotated[
        list[str] | None, typer.Option(help="A decode server that runs elsewhere; repeat.")
    ] = None,
    prefill_only: Annotated[
        bool,
        typer.Option(
            "--prefill-only",
            help="Ranks that compute prompts at --host, --port and the next ports, for a router and "
            "decode servers of your own.",
        ),
    ] = False,
) -> None:
    """Serve MODEL on ranks that outlive each other, behind vllm-router.

    Every rank is its own vllm serve, restarted with back-off when it dies; a rank that comes back
    adopts its experts from the survivors. Further arguments go to every vllm serve.

    Runs until it is interrupted. Exits 2 where arguments contradict each other or servers cannot start
    as they say, with what to change.
    """
    arguments, additional_config = split_arguments(context.args)
    disaggregation = None
    if prefill_only and (decode_servers or decode_url):
        raise DwdpConfigError(
            "--prefill-only runs no router and knows no decode servers: leave out --decode-servers and "
            "--decode-url."
        )
    if decode_args and not decode_servers:
        raise DwdpConfigError("--decode-args is for the servers of --decode-servers, which is 0.")
    if prefill_only or decode_servers or decode_url:
        urls = tuple(check_url(url) for url in decode_url or ())
        check_side_channel(os.environ, host, urls, prefill_only)
        asked = Disaggregation(
            decode_arguments=split_decode_arguments(decode_args),
            decode_urls=urls,
            side_channel_ports=(),
            only_prefill=prefill_only,
        )
        arguments, disaggregation = _disaggregation(model, ranks, arguments, decode_servers, asked)
    rank_ports = (
        tuple(range(port, port + ranks))
        if prefill_only
        else tuple(free_ports(ranks, {port, control_port}))
    )
    with launcher.meeting_folder() as rendezvous:
        plan = LaunchPlan(
            model=model,
            num_ranks=ranks,
            host=host,
            port=port,
            control_port=control_port,
            start_timeout_s=start_timeout,
            rank_ports=rank_ports,
            rendezvous=rendezvous,
            arguments=arguments,
            additional_config=additional_config,
            forks_ranks=fork_ranks,
            holds_experts=hold_experts,
            disaggregation=disaggregation,
        )
        meeting = plan.dwdp_options["rendezvous"]
        say(f"ranks meet at {meeting}; logs in {logs}/")
        launcher.launch(plan, logs, say)


def _memory(
    model: str, rank_workers: int, of_each_decode: Sequence[int], arguments: Sequence[str]
) -> Shares | None:
    """Return what each process takes of the machine's memory; None where vLLM or the user decides."""
    if not of_each_decode or count_gpus() or says_how_much(arguments, os.environ):
        return None
    total_bytes = psutil.virtual_memory().total
    return divide_memory(rank_workers, of_each_decode, model_bytes(model) or 0, total_bytes)


def _disaggregation(
    model: str,
    ranks: int,
    arguments: Sequence[str],
    decode_servers: int,
    asked: Disaggregation,
) -> tuple[tuple[str, ...], Disaggregation]:
    """Return what is left of the arguments of every server, and what there is besides ranks."""
    rest, transfer = take_transfer_config(arguments)
    of_a_decode_server = (*rest, *asked.decode_arguments)
    if not asked.only_prefill and api_key(of_a_decode_server, os.environ):
        raise DwdpConfigError(
            "--api-key, and VLLM_API_KEY, cannot be used with decode servers: in this mode "
            "vllm-router sends no client's key on to them. Leave it out, and check keys in front of "
            "the router."
        )
    of_each_decode = [devices_of(of_a_decode_server)] * decode_servers
    rank_workers = ranks * size_of(rest, TENSOR_PARALLEL)
    memory = _memory(model, rank_workers, of_each_decode, of_a_decode_server)
    return rest, _with_ports(
        replace(asked, memory=memory, transfer=transfer), ranks, of_each_decode
    )


def _with_ports(asked: Disaggregation, ranks: int, of_each_decode: Sequence[int]) -> Disaggregation:
    """Return what was asked for, with ports that are free."""
    num_decodes = len(of_each_decode)
    found = free_ports(ranks + 2 * num_decodes + len(asked.decode_urls))
    first = os.environ.get(SIDE_CHANNEL_PORT_ENV, "")
    channels = [int(first) if first.isdecimal() else free_ports_in_a_row(ranks, found)]
    taken = {*found, *range(channels[0], channels[0] + ranks)}
    for width in of_each_decode:  # at most: one port for each engine of its own
        channels.append(free_ports_in_a_row(width, taken))
        taken |= set(range(channels[-1], channels[-1] + width))
    return replace(
        asked,
        relay_ports=tuple(found[:ranks]),
        decode_ports=tuple(found[ranks : ranks + num_decodes]),
        door_ports=tuple(found[ranks + num_decodes :]),
        side_channel_ports=tuple(channels),
    )

"""`vllm-dwdp doctor`."""

from typing import Annotated, Literal

import typer
from rich.text import Text

from vllm_dwdp.entrypoints.cli.options import AsJson
from vllm_dwdp.entrypoints.doctor import checks
from vllm_dwdp.entrypoints.tables import print_json, show

Executor = Literal["uni", "mp"]
_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(
    group_size: Annotated[int, typer.Option(min=1, help="Ranks that will share experts.")] = 2,
    expert_gib: Annotated[
        float, typer.Option(min=0.0, help="GiB of one full copy of the experts, if known.")
    ] = 0.0,
    executor: Annotated[
        Executor, typer.Option(help="The dwdp option executor that the ranks will have.")
    ] = "uni",
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="Workers, and GPUs, of a rank.")
    ] = 1,
    decode_servers: Annotated[
        int, typer.Option(min=0, help="Stock servers on this machine that decode.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Check this machine and say what to change. Exits 1 if something would stop a start."""
    findings = checks.examine(
        group_size=group_size,
        expert_bytes=int(expert_gib * 2**30),
        executor=executor,
        tensor_parallel_size=tensor_parallel_size,
        decode_servers=decode_servers,
    )
    if as_json:
        print_json([finding.as_dict() for finding in findings])
    else:
        rows = [
            (each.check, Text(each.verdict, style=_COLOURS[each.verdict]), each.seen, each.advice)
            for each in findings
        ]
        show("vllm-dwdp doctor", ("check", "verdict", "seen", "what to do"), rows)
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)

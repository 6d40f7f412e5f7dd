"""`vllm-dwdp status`: the ranks that meet somewhere, as they describe themselves."""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_dwdp.distributed.endpoint import HOLDER, Endpoint, name_of
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.status import query_status
from vllm_dwdp.distributed.tcp import TcpEndpoint
from vllm_dwdp.distributed.unix import UnixEndpoint
from vllm_dwdp.entrypoints.cli.options import AsJson
from vllm_dwdp.entrypoints.cli.watch import watch
from vllm_dwdp.entrypoints.launch.fronts import answers
from vllm_dwdp.entrypoints.launch.roster import Entry, read_roster
from vllm_dwdp.entrypoints.launch.server import READY_PATH
from vllm_dwdp.entrypoints.tables import print_json, say, show
from vllm_dwdp.errors import (
    DwdpConfigError,
    ProtocolError,
    RendezvousError,
    SecretMismatchError,
)

ANSWER_TIMEOUT_S = 2.0

_SOCKET = re.compile(r"g(\d+)-(?:r(\d+)|holder)\.sock")
SILENT = "not answering"
_SERVER_HEADINGS = ("role", "index", "state", "pid", "url")
_HEADINGS = ("group", "rank", "state", "started", "pid", "held", "remote", "steps", "peers")


def status(
    rendezvous: Annotated[
        str, typer.Argument(help="The ranks' meeting place, unix:///folder or tcp://host:port.")
    ],
    as_json: AsJson = False,
    secret_file: Annotated[str, typer.Option(help="For tcp://: the shared secret.")] = "",
    group_size: Annotated[int, typer.Option(min=1, help="For tcp://: ranks of a group.")] = 1,
    groups: Annotated[int, typer.Option(min=1, help="For tcp://: groups.")] = 1,
    watching: Annotated[
        bool, typer.Option("--watch", help="Look again until Ctrl-C, with rates per second.")
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, help="For --watch: seconds between two looks.")
    ] = 2.0,
) -> None:
    """Show every rank that meets there, and holders: state, generation, memory, peers and last failure.

    Of a launch with decode servers these are shown as well.

    Exits 1 if there is none, if one is dead (also if only its peers say so), does not answer, or refuses
    to serve.
    """

    def find() -> list[dict[str, Any]]:
        return find_ranks(
            rendezvous, secret_file=secret_file or None, group_size=group_size, num_groups=groups
        )

    if watching:
        if as_json:
            raise DwdpConfigError(
                "--json is for scripts, which look once: leave out --watch, and ask again."
            )
        watch(find, f"ranks at {rendezvous}", interval)
        return
    ranks = find()
    servers = find_servers(rendezvous)
    if as_json:
        print_json(ranks + [asdict(each) for each in servers])
    else:
        show(f"ranks at {rendezvous}", _HEADINGS, [_row(entry) for entry in ranks])
        for entry in ranks:
            say(*_sentences(entry))
        if not ranks:
            say(f"no rank meets at {rendezvous}, as this host sees it")
        if servers:
            show(
                f"servers of the launch at {rendezvous}",
                _SERVER_HEADINGS,
                map(_server_row, servers),
            )
    if needs_attention(ranks) or any(each.state == SILENT for each in servers):
        raise typer.Exit(1)


def _row(entry: dict[str, Any]) -> list[str]:
    return [
        str(entry["group"]),
        _rank(entry),
        str(entry["state"]),
        _clock(entry.get("generation", 0) / 1e9),
        str(entry.get("pid", "")),
        _mib(entry.get("resident_expert_bytes", entry.get("held_bytes"))),
        _mib(entry.get("remote_expert_bytes")),
        str(sum(entry.get("steps", {}).values())),
        " ".join(f"{peer}:{state}" for peer, state in entry.get("peers", {}).items()),
    ]


def _rank(entry: dict[str, Any]) -> str:
    """Return the rank's place in its group; with tensor parallelism also the worker's in the rank."""
    if entry["dwdp_rank"] == HOLDER:
        return "holder"
    is_slice = entry.get("tensor_parallel_size", 1) > 1
    return str(entry["dwdp_rank"]) + (f" (tensor rank {entry['tensor_rank']})" if is_slice else "")


def _sentences(entry: dict[str, Any]) -> Iterator[str]:
    rank = f"{name_of(entry['dwdp_rank'])} of group {entry['group']}"
    if "held_ranks" in entry:
        yield (
            f"{rank} keeps the experts of ranks {entry['held_ranks']}; {_mib(entry['shared_bytes'])} "
            f"of its {_mib(entry['held_bytes'])} are memory that these ranks run with"
        )
    if entry.get("policy"):
        yield f"{rank} serves in {entry['mode']} mode: {entry['policy']}{_hidden_from(entry)}"
    if entry.get("weight_update"):
        weights = entry["weights"]
        source = weights["checkpoint"] or "a trainer"
        yield (
            f"{rank} has the weights of update {entry['weight_update']}, from {source} "
            f"({weights['digest'][:19]})"
        )
    if entry.get("doing"):
        yield f"{rank} {entry['doing']}"
    if seconds := entry.get("start_seconds"):
        phases = ", ".join(f"{phase} {each:.1f} s" for phase, each in seconds.items())
        yield (
            f"{rank} started: {phases}; read {_mib(entry['read_expert_bytes'])} of experts from disk, "
            f"digested {_mib(entry['digested_bytes'])}"
        )
    if entry.get("last_failure"):
        when = _clock(entry.get("last_failure_at", 0.0))
        topic = f"{rank}, last failure {when}" if when else rank
        yield f"{topic}: {entry['last_failure']}"


def _hidden_from(entry: dict[str, Any]) -> str:
    tokens = entry.get("break_even_tokens")
    return (
        "" if tokens is None else f"; copies are hidden in steps of about {tokens} tokens and more"
    )


def _clock(seconds: float) -> str:
    """Format a Unix time as the local date and time; empty for 0."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def _mib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**20:.0f} MiB"


def find_ranks(
    rendezvous: str, *, secret_file: str | None, group_size: int, num_groups: int
) -> list[dict[str, Any]]:
    """Ask each rank and each holder for its status, in order of group and rank.

    A holder comes before the ranks of its group; its `dwdp_rank` is `HOLDER`.

    `state` is what it says (`ExpertGroup.status`), `not answering` (a process listens in its place) or
    `dead`.

    Args:
        rendezvous: where they meet.
        secret_file: for `tcp://`.
        group_size: ranks of a group; for `tcp://`, where no folder lists them.
        num_groups: as `group_size`.

    Raises:
        DwdpConfigError: ranks there cannot be listed, or the secret cannot be used.
    """
    endpoint = parse_endpoint(rendezvous, group_size, secret_file)
    if isinstance(endpoint, UnixEndpoint):
        places = _listed(Path(endpoint.location))
    elif isinstance(endpoint, TcpEndpoint):
        places = [(group, rank) for group in range(num_groups) for rank in range(group_size)]
    else:
        raise DwdpConfigError(
            f"{rendezvous!r} cannot be listed: ranks started together meet under a name that only "
            "they know; their figures are on /metrics of the server. Give unix:///folder."
        )
    return [_ask(endpoint, group, rank) for group, rank in sorted(places)]


def _listed(folder: Path) -> list[tuple[int, int]]:
    """List group and rank of every socket in the folder; `HOLDER` for a group's holder.

    Raises:
        DwdpConfigError: the folder is there, and may not be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DwdpConfigError(
            f"ranks that meet in {folder} cannot be listed: {error.strerror}. Ask as the user whose "
            "ranks they are, or as root, and give the folder that they were given."
        ) from error
    matches = map(_SOCKET.fullmatch, names)
    return [(int(match[1]), int(match[2] or HOLDER)) for match in matches if match is not None]


def _ask(endpoint: Endpoint, group: int, rank: int) -> dict[str, Any]:
    place: dict[str, Any] = {"group": group, "dwdp_rank": rank}
    try:
        return query_status(endpoint, group, rank, timeout_s=ANSWER_TIMEOUT_S) | place
    except (RendezvousError, OSError) as error:
        if rank not in endpoint.listening(group, (rank,), ANSWER_TIMEOUT_S):
            return place | {"state": "dead", "last_failure": str(error)}
        explained = isinstance(error, (ProtocolError, SecretMismatchError))
        silent = f"listens at {endpoint}, and did not say how it is in {ANSWER_TIMEOUT_S:g} s"
        failure = str(error) if explained else silent
        return place | {"state": "not answering", "last_failure": failure}


def find_servers(rendezvous: str) -> list[Entry]:
    """Return the servers of the disaggregated launch that meets there, each asked for its health."""
    servers = []
    for entry in read_roster(rendezvous):
        is_said_to_serve = entry.state == "serving"
        silent = is_said_to_serve and not answers(entry.url + READY_PATH)
        servers.append(replace(entry, state=SILENT) if silent else entry)
    return servers


def _server_row(entry: Entry) -> list[str]:
    pid = "" if entry.pid is None else str(entry.pid)
    return [entry.role, str(entry.index), entry.state, pid, entry.url]


def needs_attention(ranks: list[dict[str, Any]]) -> bool:
    """Say whether no rank is there, or a rank is dead, silent or refuses, or one has lost a peer.

    A dead rank's socket may have been tidied away: then only its peers know of it.
    """
    ranks = [entry for entry in ranks if entry["dwdp_rank"] != HOLDER]
    states = [entry["state"] for entry in ranks]
    states += [state for entry in ranks for state in entry.get("peers", {}).values()]
    return not ranks or not {"dead", "not answering", "refusing"}.isdisjoint(states)

"""Launches of ranks and decode servers, which small real processes stand for."""

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.entrypoints.launch.fakes import interrupt, run
from vllm_dwdp.entrypoints.launch import launcher as launch
from vllm_dwdp.entrypoints.launch import pairing
from vllm_dwdp.entrypoints.launch.disaggregation import Disaggregation
from vllm_dwdp.entrypoints.launch.plan import LaunchPlan
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.roster import read_roster
from vllm_dwdp.errors import DwdpConfigError

pytestmark = pytest.mark.timeout(60)


def disaggregated(fakes: LaunchPlan, use: Callable[[Any, str, Any], None], **facts: Any) -> Any:
    """Two ranks and a decode server, of which each pair fits."""
    use(launch, "check_nixl", lambda: None)
    pairs: list[tuple[str, str]] = []
    use(pairing, "check_pair", lambda rank, decode, _: pairs.append((rank.name, decode.name)))
    *relays, decode, door = free_ports(4, {fakes.port, *fakes.rank_ports})
    ports = {"relay_ports": tuple(relays), "decode_ports": (decode,), "door_ports": (door,)}
    given = ports | facts
    made = Disaggregation(side_channel_ports=(5600, 5700), **given)
    return replace(fakes, disaggregation=made), pairs


def test_a_disaggregated_launch(
    fakes: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every server is a line; every pair is tried before the router starts; the router ends last."""
    made, pairs = disaggregated(fakes, monkeypatch.setattr)
    made = replace(made, rendezvous=f"unix://{tmp_path}")
    (decode,) = made.decode_urls
    listed: list[Any] = []
    (tmp_path / "decode-wait").touch()

    def react(line: str, lines: list[str]) -> None:
        if sum(told.startswith("rank") and "serving" in told for told in lines) == 2:
            threading.Timer(0.3, (tmp_path / "decode-wait").unlink, [True]).start()
        if line.startswith("all 2 ranks"):
            listed.extend(read_roster(f"unix://{tmp_path}"))
            interrupt()

    lines = run(made, tmp_path, react)
    told = [re.sub(r"pid \d+", "pid", line) for line in lines]
    serving = [f"rank {rank}: serving, pid, prefill at {made.rank_url(rank)}" for rank in (0, 1)]
    serving.append(f"decode 0: serving, pid, decode at {decode}")
    assert {*serving} < {*told}
    router = told.index("router: starting, pid")
    assert all(told.index(line) < router for line in serving)
    assert told[-2] == f"all 2 ranks serve at {made.url}, with decode servers {decode}"
    assert pairs == [
        (f"rank {rank} ({made.rank_url(rank)})", f"decode 0 ({decode})") for rank in (0, 1)
    ]
    assert [(each.role, each.index, each.url, each.state) for each in listed] == [
        ("prefill", 0, made.rank_url(0), "serving"),
        ("prefill", 1, made.rank_url(1), "serving"),
        ("decode", 0, decode, "serving"),
    ]
    assert not list(tmp_path.glob("servers.json"))


def test_a_decode_server_that_does_not_fit_ends_everything_before_the_router_starts(
    fakes: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = disaggregated(fakes, monkeypatch.setattr)

    def refuse(rank: Any, decode: Any, arguments: Any) -> None:
        raise DwdpConfigError("--block-size is 16 there")

    monkeypatch.setattr(pairing, "check_pair", refuse)
    lines: list[str] = []
    with pytest.raises(DwdpConfigError, match="--block-size is 16 there"):
        run(made, tmp_path, lambda line, _: lines.append(line))
    assert not any("router" in line for line in lines)


def test_ranks_alone_need_no_router(
    fakes: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm-router").unlink()
    facts = {"relay_ports": (), "decode_ports": (), "door_ports": (), "only_prefill": True}
    made, pairs = disaggregated(fakes, monkeypatch.setattr, **facts)
    complete = f"all 2 ranks serve at {', '.join(made.rank_urls)}"
    lines = run(made, tmp_path, lambda line, _: interrupt() if line == complete else None)
    assert complete in lines and not pairs
    assert not any("router" in line or "relay" in line for line in lines)

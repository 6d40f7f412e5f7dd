"""The deployment examples: they parse, and name only flags, options and metrics that exist."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_dwdp import metrics
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.entrypoints.launch import LaunchPlan

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"


def compose_commands() -> list[str]:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert {services[f"rank{rank}"]["environment"]["RANK"] for rank in (0, 1)} == {"0", "1"}
    return [services["rank0"]["command"][0], services["rank1"]["command"][0]]


def kubernetes_commands() -> list[str]:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["StatefulSet", "Service"]
    return list(documents[0]["spec"]["template"]["spec"]["containers"][0]["args"])


def systemd_commands() -> list[str]:
    unit = (DEPLOY / "vllm-dwdp@.service").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ExecStart=/bin/sh -c '(.*)'$", unit, re.MULTILINE)
    return [line.replace('\\\\"', '\\"')]


@pytest.mark.parametrize("commands", [compose_commands, kubernetes_commands, systemd_commands])
def test_every_rank_is_given_options_that_exist(commands: Any) -> None:
    for command in commands():
        words = shlex.split(command.replace("$$", "$"))
        assert words[:3] == ["exec", "vllm", "serve"]
        assert words[words.index("--distributed-executor-backend") + 1] == "dwdp"
        assert "--data-parallel-rank" in words
        options = json.loads(words[words.index("--additional-config") + 1])["dwdp"]
        config = DwdpConfig.from_options(options, data_parallel_size=2)
        assert config.rendezvous is not None
        assert Endpoint.parse(config.rendezvous).kind == "unix"


def test_readiness_and_liveness_are_told_apart() -> None:
    """`/health` is 200 while a rank waits for its peers; traffic must wait for `/ping`."""
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    (container,) = documents[0]["spec"]["template"]["spec"]["containers"]
    paths = {
        probe: container[f"{probe}Probe"]["httpGet"]["path"]
        for probe in ("startup", "readiness", "liveness")
    }
    assert paths == {"startup": "/health", "readiness": "/ping", "liveness": "/health"}
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert "--health-check-endpoint=/ping" in services["router"]["command"]
    for rank in ("rank0", "rank1"):
        assert "/ping" in services[rank]["healthcheck"]["test"][-1]
    plan = LaunchPlan(
        model="m",
        num_ranks=1,
        host="127.0.0.1",
        port=1,
        rank_ports=(2,),
        rendezvous="unix:///x",
        arguments=(),
        additional_config={},
    )
    command = plan.router_command()
    assert command[command.index("--health-check-endpoint") + 1] == "/ping"


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = re.findall(r"vllm:dwdp_\w+", json.dumps(dashboard))
    made = metrics.RankMetrics("m")
    known = set()
    for value in vars(made).values():
        for metric in value.values() if isinstance(value, dict) else [value]:
            described = getattr(metric, "describe", lambda: [])()
            for family in described:
                total = "_total" if family.type == "counter" else ""
                known.add(family.name + total)
    assert asked
    assert set(asked) <= known

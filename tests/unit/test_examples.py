"""The deployment examples: they parse, and name only flags, options and metrics that exist."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_dwdp.compat.frontend import metrics
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.unix import UnixEndpoint
from vllm_dwdp.entrypoints.launch import pairing
from vllm_dwdp.entrypoints.launch import plan as launch_plan
from vllm_dwdp.entrypoints.launch.plan import LaunchPlan

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
        assert isinstance(parse_endpoint(config.rendezvous), UnixEndpoint)


def rendezvous_of(command: str) -> Path:
    words = shlex.split(command.replace("$$", "$"))
    options = json.loads(words[words.index("--additional-config") + 1])["dwdp"]
    return Path(options["rendezvous"].removeprefix("unix://"))


def mounted_at(mounts: list[dict[str, Any]], folder: Path) -> str:
    """The volume that holds a folder."""
    (name,) = (mount["name"] for mount in mounts if folder.is_relative_to(mount["mountPath"]))
    return str(name)


def kubernetes_pod() -> dict[str, Any]:
    stateful_set, _ = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod: dict[str, Any] = stateful_set["spec"]["template"]["spec"]
    return pod


def test_the_pods_meeting_place_is_made_for_their_user() -> None:
    """A hostPath is made as root:root 0755, where a rank can make no folder."""
    pod = kubernetes_pod()
    user = pod["securityContext"]["runAsUser"]
    (rank,) = pod["containers"]
    folder = rendezvous_of(rank["args"][0])
    volume = mounted_at(rank["volumeMounts"], folder)
    (kind,) = (each for each in pod["volumes"] if each["name"] == volume)
    assert "hostPath" in kind, "only a folder of the node is shared by pods"
    (maker,) = pod["initContainers"]
    assert maker["securityContext"]["runAsUser"] == 0
    assert mounted_at(maker["volumeMounts"], folder) == volume
    assert maker["command"] == shlex.split(f"install -d -m 700 -o {user} -g {user} {folder}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_rank_can_listen_where_the_pod_was_prepared() -> None:
    pod = kubernetes_pod()
    user = pod["securityContext"]["runAsUser"]
    with tempfile.TemporaryDirectory() as host:
        os.chmod(host, 0o755)  # as the kubelet makes it
        folder = Path(host) / "meet"
        command = pod["initContainers"][0]["command"]
        for _ in range(2):  # every pod runs it; the second finds the first one's folder
            subprocess.run([*command[:-1], str(folder)], check=True)
        code = "import os; from vllm_dwdp.distributed.meeting import parse_endpoint; "
        code += f"os.setgid({user}); os.setuid({user}); "
        code += f"listener = parse_endpoint('unix://{folder}').listen(0, 0); "
        code += f"print(os.listdir('{folder}'))"
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
        assert ended.stdout.strip() == "['g0-r0.sock']"


def test_the_containers_meeting_place_belongs_to_their_user() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    made = dict(
        item.split("=") for item in compose["volumes"]["meet"]["driver_opts"]["o"].split(",")
    )
    for name in ("rank0", "rank1"):
        service = compose["services"][name]
        assert service["user"] == f"{made['uid']}:{made['gid']}"
        mounts = [
            {"name": volume, "mountPath": path}
            for volume, path, *_ in (text.rsplit(":", 2) for text in service["volumes"])
            if volume == "meet"
        ]
        assert mounted_at(mounts, rendezvous_of(service["command"][0])) == "meet"
    assert int(made["mode"], 8) == 0o700


def test_the_units_meeting_place_belongs_to_their_user() -> None:
    unit = (DEPLOY / "vllm-dwdp@.service").read_text()
    facts = dict(re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE))
    assert facts["User"] != "root"
    assert facts["RuntimeDirectoryMode"] == "0700"
    assert facts["RuntimeDirectoryPreserve"] == "yes", "the other ranks go on meeting there"
    (command,) = systemd_commands()
    assert rendezvous_of(command).is_relative_to(f"/run/{facts['RuntimeDirectory']}")


def test_health_says_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port opens when a rank can answer: `/health` tells readiness as with stock vLLM."""
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    (container,) = documents[0]["spec"]["template"]["spec"]["containers"]
    for probe in ("startup", "readiness", "liveness"):
        assert container[f"{probe}Probe"]["httpGet"] == {"path": "/health", "port": 8000}
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert "--health-check-endpoint=/health" in services["router"]["command"]
    for rank in ("rank0", "rank1"):
        assert "/health" in services[rank]["healthcheck"]["test"][-1]
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
    monkeypatch.setattr(launch_plan, "find_program", str)
    command = plan.router_command()
    assert command[command.index("--health-check-endpoint") + 1] == "/health"


def test_probes_outlast_the_wait_for_peers() -> None:
    """A rank that waits as long as it may is neither restarted nor called unhealthy meanwhile."""
    longest_s = DwdpConfig(group_size=2).join_timeout_s
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    (container,) = documents[0]["spec"]["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > 2 * longest_s
    assert documents[0]["spec"]["podManagementPolicy"] == "Parallel", "ranks start at once"
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    period = services["rank0"]["healthcheck"]["start_period"]
    assert 60 * int(period.removesuffix("m")) > 2 * longest_s
    unit = (DEPLOY / "vllm-dwdp@.service").read_text()
    assert "Type=" not in unit, "systemd does not wait for a rank to be ready"


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


def test_metrics_of_kv_transfers_are_vllms() -> None:
    """Read from vLLM's files: importing them takes seconds."""
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None and vllm.submodule_search_locations
    folder = Path(vllm.submodule_search_locations[0])
    connector = folder / "distributed/kv_transfer/kv_connector/v1/nixl/stats.py"
    known = {*re.findall(r"name=\"(vllm:nixl_\w+)\"", connector.read_text())}
    guide = Path(__file__).parents[2] / "docs" / "disaggregation.md"
    texts = [(DEPLOY / "grafana.json").read_text(), guide.read_text(), pairing.RECEIVED]
    for text in texts:
        asked = re.findall(r"vllm:nixl_\w+", text)
        assert asked
        assert {re.sub("_(total|sum|bucket)$", "", name) for name in asked} <= known
    assert f'"{pairing.CACHE_INFO}"' in (folder / "v1/metrics/loggers.py").read_text()


def test_the_guide_names_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    guides = [root / "docs" / name for name in ("operations.md", "disaggregation.md")]
    named = set(re.findall(r"`(test_\w+)`", "".join(guide.read_text() for guide in guides)))
    assert len(named) > 10
    assert named <= {path.stem for path in (root / "tests").rglob("test_*.py")}

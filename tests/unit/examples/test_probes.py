"""How the examples ask whether a server is well."""

from itertools import pairwise
from pathlib import Path

import pytest

from tests.unit.examples.deployments import (
    COMPOSE,
    DEPLOY,
    KUBERNETES,
    LLM_D,
    arguments,
    compose,
    documents,
    is_a_server,
    pods,
)
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.entrypoints.launch import hop, relay
from vllm_dwdp.entrypoints.launch import plan as launch_plan
from vllm_dwdp.entrypoints.launch.plan import LaunchPlan
from vllm_dwdp.entrypoints.launch.server import READY_PATH


def test_the_relay_is_probed_where_it_answers_for_all_its_ports(tmp_path: Path) -> None:
    (container,) = (
        each
        for each in pods("kubernetes.disaggregated")[2]["containers"]
        if each["name"] == "relay"
    )
    given = relay.parse(arguments(tmp_path, container["args"][0])[3:])
    assert given.host == "0.0.0.0", "the kubelet asks the pod's address"
    for probe in ("readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["path"] == hop.ALIVE_PATH and asked["port"] in given.ports
        doors_and_ports = len(given.decode) + len(given.ports)
        assert container[probe]["timeoutSeconds"] > doors_and_ports * hop.ALIVE_TIMEOUT_S
    service = compose("compose.disaggregated")["services"]["relay"]
    ports = relay.parse(arguments(tmp_path, service["command"][0])[3:]).ports
    assert f":{ports[0]}{hop.ALIVE_PATH}'" in service["healthcheck"]["test"][-1]


@pytest.mark.parametrize("name", [*KUBERNETES, LLM_D])
def test_health_says_everything_about_a_pod(name: str) -> None:
    """The port opens when a rank can answer: `/health` tells readiness as with stock vLLM."""
    servers = [each for pod in pods(name) for each in pod["containers"] if is_a_server(each)]
    assert servers
    for container in servers:
        (port,) = (each["containerPort"] for each in container["ports"])
        for probe in ("startup", "readiness", "liveness"):
            assert container[f"{probe}Probe"]["httpGet"] == {"path": READY_PATH, "port": port}


@pytest.mark.parametrize("name", COMPOSE)
def test_health_says_everything_about_a_container(name: str, tmp_path: Path) -> None:
    services = compose(name)["services"]
    for service in set(services) - {"relay"}:
        assert READY_PATH in services[service]["healthcheck"]["test"][-1]
    asked = arguments(tmp_path, services["router"]["command"][0])
    assert f"--health-check-endpoint={READY_PATH}" in asked


def test_the_routers_of_examples_look_as_often_as_launchs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    words = plan.router_command()
    looks = {
        f"{word}={following}" for word, following in pairwise(words) if word.startswith("--health-")
    }
    assert f"--health-check-endpoint={READY_PATH}" in looks
    commands = [compose(name)["services"]["router"]["command"][0] for name in COMPOSE]
    commands.append(pods("kubernetes.disaggregated")[2]["containers"][1]["args"][0])
    for command in commands:
        assert looks <= {*arguments(tmp_path, command)}


def test_probes_outlast_the_wait_for_peers() -> None:
    """A rank that waits as long as it may is neither restarted nor called unhealthy meanwhile."""
    longest_s = DwdpConfig(group_size=2).join_timeout_s
    for name in (*KUBERNETES, LLM_D):
        for container in (each for pod in pods(name) for each in pod["containers"]):
            if is_a_server(container):
                probe = container["startupProbe"]
                assert probe["periodSeconds"] * probe["failureThreshold"] > 2 * longest_s
    for name in KUBERNETES:
        (ranks,) = documents(name, "StatefulSet")
        assert ranks["spec"]["podManagementPolicy"] == "Parallel", "ranks start at once"
    for name in COMPOSE:
        period = compose(name)["services"]["rank0"]["healthcheck"]["start_period"]
        assert 60 * int(period.removesuffix("m")) > 2 * longest_s
    unit = (DEPLOY / "vllm-dwdp@.service").read_text()
    assert "Type=" not in unit, "systemd does not wait for a rank to be ready"

"""The deployment examples: they parse, and name only flags, options and metrics that exist."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.compose import load
from vllm_dwdp.compat.frontend import metrics
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.unix import UnixEndpoint
from vllm_dwdp.entrypoints.launch import hop, pairing, relay
from vllm_dwdp.entrypoints.launch import plan as launch_plan
from vllm_dwdp.entrypoints.launch.disaggregation import (
    CONNECTOR,
    CONSUMER,
    PRODUCER,
    SIDE_CHANNEL_HOST_ENV,
)
from vllm_dwdp.entrypoints.launch.plan import LaunchPlan
from vllm_dwdp.entrypoints.launch.server import READY_PATH

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
COMPOSE = ("compose", "compose.disaggregated")
KUBERNETES = ("kubernetes", "kubernetes.disaggregated")
LLM_D = "llm-d-values"
KUBERNETES_VERSION = "1.31"
SETTINGS = {"IMAGE": "image", "MODEL": "/models/model"}


def compose(name: str) -> dict[str, Any]:
    return load(DEPLOY / f"{name}.yaml", SETTINGS)


def documents(name: str, kind: str) -> list[dict[str, Any]]:
    """Return the objects of a kind in a file for Kubernetes."""
    every = yaml.safe_load_all((DEPLOY / f"{name}.yaml").read_text())
    return [each for each in every if each["kind"] == kind]


def pods(name: str) -> list[dict[str, Any]]:
    """Every kind of pod in a file, the ranks' first."""
    if name == LLM_D:
        values = yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())
        made = []
        for role in ("prefill", "decode"):
            pod = {key: value for key, value in values[role].items() if key != "extraConfig"}
            pod["containers"] = [
                container | container["extraConfig"] for container in pod["containers"]
            ]
            made.append(pod | values[role].get("extraConfig", {}))
        return made
    owners = documents(name, "StatefulSet") + documents(name, "Deployment")
    return [owner["spec"]["template"]["spec"] for owner in owners]


def arguments(folder: Path, command: str, **environment: str) -> list[str]:
    """Return what a shell command gives to the program that it becomes, the program's name first."""
    for name in ("vllm", "vllm-router", "python3"):
        program = folder / name
        program.write_text('#!/bin/sh\nprintf \'%s\\0\' "${0##*/}" "$@"\n')
        program.chmod(0o755)
    found = subprocess.run(
        ["/bin/sh", "-c", command],
        env={"PATH": f"{folder}:/usr/bin:/bin"} | environment,
        capture_output=True,
        check=True,
    )
    return found.stdout.decode().split("\0")[:-1]


def compose_ranks(folder: Path, name: str) -> list[list[str]]:
    services = [
        each for each in compose(name)["services"].values() if "RANK" in each["environment"]
    ]
    return [arguments(folder, each["command"][0], **each["environment"]) for each in services]


def pod_ranks(folder: Path, name: str) -> list[list[str]]:
    (container,) = pods(name)[0]["containers"]
    command = container["args"][0]
    if name == LLM_D:
        command = command.replace("/run/vllm-dwdp/prefill/rank", f"{folder}/rank")
        return [arguments(folder, command)]
    hosts = (f"{documents(name, 'StatefulSet')[0]['metadata']['name']}-{rank}" for rank in (0, 1))
    return [arguments(folder, command, HOSTNAME=host) for host in hosts]


def systemd_ranks(folder: Path, name: str) -> list[list[str]]:
    unit = (DEPLOY / f"{name}.service").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ExecStart=/bin/sh -c '(.*)'$", unit, re.MULTILINE)
    command = line.replace('\\\\"', '\\"').replace("%i", "1")
    return [arguments(folder, command, MODEL="/models/model", RANKS="2")]


@pytest.fixture(
    params=[
        *((compose_ranks, name) for name in COMPOSE),
        *((pod_ranks, name) for name in (*KUBERNETES, LLM_D)),
        (systemd_ranks, "vllm-dwdp@"),
    ],
    ids=lambda param: param[1],
)
def ranks(request: pytest.FixtureRequest, tmp_path: Path) -> list[list[str]]:
    """Return what the program of each rank of an example is given."""
    find, name = request.param
    found: list[list[str]] = find(tmp_path, name)
    return found


def value(words: list[str], option: str) -> str:
    (at,) = (number for number, word in enumerate(words) if word == option)
    return words[at + 1]


def options_of(words: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = json.loads(value(words, "--additional-config"))["dwdp"]
    return options


def rendezvous_of(words: list[str]) -> Path:
    return Path(options_of(words)["rendezvous"].removeprefix("unix://"))


def test_every_rank_is_given_options_that_exist(ranks: list[list[str]]) -> None:
    for rank, words in enumerate(ranks):
        assert words[:2] == ["vllm", "serve"]
        assert value(words, "--distributed-executor-backend") == "dwdp"
        assert value(words, "--data-parallel-size") == "2"
        assert len(ranks) == 1 or value(words, "--data-parallel-rank") == str(rank)
        config = DwdpConfig.from_options(options_of(words), data_parallel_size=2)
        assert config.rendezvous is not None
        assert isinstance(parse_endpoint(config.rendezvous), UnixEndpoint)


def test_every_flag_of_a_rank_is_one_of_a_command_that_a_test_runs(
    ranks: list[list[str]], tmp_path: Path
) -> None:
    """`tests/e2e/test_compose.py` runs the commands of the Compose files."""
    run = {word for name in COMPOSE for words in compose_ranks(tmp_path, name) for word in words}
    asked = {word for words in ranks for word in words if word.startswith("--")}
    assert asked - run <= {"--served-model-name"}


@pytest.mark.parametrize("name", ["compose.disaggregated", "kubernetes.disaggregated", LLM_D])
def test_ranks_offer_kv_blocks_where_decode_servers_reach_them(name: str, tmp_path: Path) -> None:
    find = compose_ranks if name in COMPOSE else pod_ranks
    for words in find(tmp_path, name):
        transfer = json.loads(value(words, "--kv-transfer-config"))
        assert transfer == {"kv_connector": CONNECTOR, "kv_role": PRODUCER}
    if name in COMPOSE:
        rank = compose(name)["services"]["rank0"]
        assert f'{SIDE_CHANNEL_HOST_ENV}="$(hostname -i)"' in rank["command"][0]
        decode = compose(name)["services"]["decode0"]
        words = arguments(tmp_path, decode["command"][0], **decode["environment"])
    else:
        pod_of_ranks, pod_of_decode, *_ = pods(name)
        variables = {each["name"]: each for each in pod_of_ranks["containers"][0]["env"]}
        address = variables[SIDE_CHANNEL_HOST_ENV]["valueFrom"]["fieldRef"]["fieldPath"]
        assert address == "status.podIP"
        given = pod_of_decode["containers"][0]["args"]
        words = given if name == LLM_D else arguments(tmp_path, given[0])
    transfer = json.loads(value(words, "--kv-transfer-config"))
    recompute = {"kv_load_failure_policy": "recompute"}
    assert transfer == {"kv_connector": CONNECTOR, "kv_role": CONSUMER} | recompute


@pytest.mark.parametrize("name", ["compose.disaggregated", "kubernetes.disaggregated"])
def test_the_router_asks_the_relay_for_every_server(name: str, tmp_path: Path) -> None:
    if name in COMPOSE:
        services = compose(name)["services"]
        commands = {each: services[each]["command"][0] for each in ("relay", "router")}
    else:
        containers = pods(name)[2]["containers"]
        commands = {each["name"]: each["args"][0] for each in containers}
    program, *words = arguments(tmp_path, commands["relay"])
    assert (program, words[:2]) == ("python3", ["-m", relay.__name__])
    given = relay.parse(words[2:])
    assert len(given.urls) == len({*given.urls}) == 2
    asked = arguments(tmp_path, commands["router"])
    for option, ports in (
        ("--prefill", given.ports),
        ("--decode", [port for port, _ in given.decode]),
    ):
        urls = [asked[at + 1] for at, word in enumerate(asked) if word == option]
        assert [int(url.rpartition(":")[2]) for url in urls] == ports
    assert given.compare and len(given.decode) == 1


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


@pytest.mark.skipif(not shutil.which("flock"), reason="needs util-linux")
def test_pods_without_a_number_become_different_ranks(tmp_path: Path) -> None:
    """Each takes the first number whose lock is free; one whose pod was killed is free again."""
    command = pods(LLM_D)[0]["containers"][0]["args"][0]
    command = command.replace("/run/vllm-dwdp/prefill/rank", f"{tmp_path}/rank")
    program = tmp_path / "vllm"
    program.write_text(
        '#!/bin/sh\nwhile [ "$1" != --data-parallel-rank ]; do shift; done; echo "$2"\nread wait\n'
    )
    program.chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["/bin/sh", "-c", command],
            env=path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    with ExitStack() as opened:
        started = []
        for expected in ("0\n", "1\n", ""):
            started.append(opened.enter_context(start()))
            opened.callback(started[-1].kill)
            output = started[-1].stdout
            assert output is not None and output.readline() == expected
        assert started[2].wait(10) == 1, "there is no third rank"
        started[0].kill()
        started[0].wait(10)
        again = opened.enter_context(start())
        opened.callback(again.kill)
        assert again.stdout is not None and again.stdout.readline() == "0\n"


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files_follow_their_schema(name: str, schemas: str) -> None:
    program = [schemas, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run(
        [*program, str(DEPLOY / f"{name}.yaml")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", KUBERNETES)
def test_objects_for_kubernetes_follow_their_schemas(name: str, schemas: str) -> None:
    code = f"""if 1:
        import kubernetes_validate, sys, yaml
        for each in yaml.safe_load_all(open(sys.argv[1])):
            kubernetes_validate.validate(each, {KUBERNETES_VERSION!r}, strict=True)
    """
    checked = subprocess.run(
        [schemas, "-c", code, str(DEPLOY / f"{name}.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def mounted_at(mounts: list[dict[str, Any]], folder: Path) -> str:
    """Return the volume that holds a folder."""
    (name,) = (mount["name"] for mount in mounts if folder.is_relative_to(mount["mountPath"]))
    return str(name)


@pytest.mark.parametrize("name", [*KUBERNETES, LLM_D])
def test_the_pods_meeting_place_is_made_for_their_user(name: str, tmp_path: Path) -> None:
    """A hostPath is made as root:root 0755, where a rank can make no folder."""
    pod = pods(name)[0]
    user = pod["securityContext"]["runAsUser"]
    (rank,) = pod["containers"]
    folder = rendezvous_of(pod_ranks(tmp_path, name)[0])
    volume = mounted_at(rank["volumeMounts"], folder)
    (kind,) = (each for each in pod["volumes"] if each["name"] == volume)
    assert "hostPath" in kind, "only a folder of the node is shared by pods"
    (maker,) = pod["initContainers"]
    assert maker["securityContext"]["runAsUser"] == 0
    assert mounted_at(maker["volumeMounts"], folder) == volume
    assert maker["command"] == shlex.split(f"install -d -m 700 -o {user} -g {user} {folder}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_rank_can_listen_where_the_pod_was_prepared() -> None:
    pod = pods("kubernetes")[0]
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


@pytest.mark.parametrize("name", COMPOSE)
def test_the_containers_meeting_place_belongs_to_their_user(name: str, tmp_path: Path) -> None:
    content = compose(name)
    made = dict(
        item.split("=") for item in content["volumes"]["meet"]["driver_opts"]["o"].split(",")
    )
    for number, words in enumerate(compose_ranks(tmp_path, name)):
        service = content["services"][f"rank{number}"]
        assert service["user"] == f"{made['uid']}:{made['gid']}"
        mounts = [
            {"name": volume, "mountPath": path}
            for volume, path, *_ in (text.rsplit(":", 2) for text in service["volumes"])
            if volume == "meet"
        ]
        assert mounted_at(mounts, rendezvous_of(words)) == "meet"
    assert int(made["mode"], 8) == 0o700


def test_the_units_meeting_place_belongs_to_their_user(tmp_path: Path) -> None:
    unit = (DEPLOY / "vllm-dwdp@.service").read_text()
    facts = dict(re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE))
    assert facts["User"] != "root"
    assert facts["RuntimeDirectoryMode"] == "0700"
    assert facts["RuntimeDirectoryPreserve"] == "yes", "the other ranks go on meeting there"
    (words,) = systemd_ranks(tmp_path, "vllm-dwdp@")
    assert rendezvous_of(words).is_relative_to(f"/run/{facts['RuntimeDirectory']}")


def is_a_server(container: dict[str, Any]) -> bool:
    return "ports" in container


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

"""The commands in the deployment examples name only flags and options that exist."""

import json
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.unit.examples.deployments import (
    COMPOSE,
    KUBERNETES,
    LLM_D,
    arguments,
    compose,
    compose_ranks,
    options_of,
    pod_ranks,
    pods,
    systemd_ranks,
    value,
)
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.unix import UnixEndpoint
from vllm_dwdp.entrypoints.launch import relay
from vllm_dwdp.entrypoints.launch.disaggregation import (
    CONNECTOR,
    CONSUMER,
    PRODUCER,
    SIDE_CHANNEL_HOST_ENV,
)


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

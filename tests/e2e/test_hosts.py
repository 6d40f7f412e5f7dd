"""Ranks of two hosts that meet over `tcp://`. NO GPU AND NO SECOND HOST: see below.

The hosts are network namespaces with a cable between them. The experts lie in memory of the fake CUDA
driver, whose fabric handles another process can import; only those travel over `tcp://`.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.engine_process import PROMPTS
from tests.helpers import simulated_gpu
from tests.helpers.hosts import enter_network_namespace, hosts  # noqa: F401
from tests.multiprocess.tcp_places import secret_file
from vllm_dwdp.entrypoints.cli.status import find_ranks
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.server import SERVE, Server

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.feature("Several hosts over tcp://"),
]

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PLACE = f"tcp://{','.join(ADDRESSES)}:7100"
SETTINGS = (
    *(
        "--served-model-name",
        "m",
        "--max-model-len",
        "512",
        "--enforce-eager",
        "--max-num-seqs",
        "1",
    ),
    *("--max-num-batched-tokens", "64", "--distributed-executor-backend", "dwdp"),
)
T = TypeVar("T")


class Host:
    """One of the two: starts servers there, and asks from there."""

    def __init__(self, number: int, namespace: str, folder: Path, secret: str) -> None:
        self.number = number
        self._namespace = namespace
        self._folder = folder
        self._secret = secret
        self._inside = ThreadPoolExecutor(1, initializer=self._enter)

    def _enter(self) -> None:
        with open(f"/run/netns/{self._namespace}") as namespace:
            enter_network_namespace(namespace.fileno())  # of this thread

    def start(self, model: str, *arguments: str) -> Server:
        """Return a server whose ranks meet at `PLACE`."""
        options = {"mode": "prefetch", "rendezvous": PLACE, "rendezvous_secret_file": self._secret}
        return Server(
            [
                *(model, *SETTINGS, "--data-parallel-size", "2", *arguments),
                *("--additional-config", json.dumps({"dwdp": options})),
            ],
            self._folder / f"host{self.number}.log",
            simulated_gpu.environment() | {"VLLM_HOST_IP": ADDRESSES[self.number]},
            program=("ip", "netns", "exec", self._namespace, *SERVE),
        )

    def do(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call it in a thread that is on this host."""
        return self._inside.submit(function, *arguments, **named).result()

    def ranks(self) -> list[dict[str, Any]]:
        """Return what `vllm-dwdp status` finds from here."""
        return self.do(find_ranks, PLACE, secret_file=self._secret, group_size=2, num_groups=1)

    def close(self) -> None:
        self._inside.shutdown()


@pytest.fixture
def two_hosts(hosts: tuple[str, str], tmp_path: Path) -> Iterator[list[Host]]:  # noqa: F811
    secret = secret_file(tmp_path)
    made = [Host(number, name, tmp_path, secret) for number, name in enumerate(hosts)]
    yield made
    for host in made:
        host.close()


@pytest.fixture
def model(checkpoints: Checkpoints) -> str:
    """Experts of several pages of 2 MiB, most of which end within one."""
    return checkpoints("mixtral", 8, hidden_size=512, intermediate_size=1408)


@pytest.fixture
def expected(stock: StockEngine, model: str) -> list[list[int]]:
    tokens: list[list[int]] = stock(model)["tokens"]
    return tokens


def check_ranks(ranks: list[dict[str, Any]]) -> None:
    """Both serve, and each has copied the other's experts out of memory that a handle names."""
    assert [each["dwdp_rank"] for each in ranks] == [0, 1]
    for each in ranks:
        assert each["state"] == "serving" and each["mode"] == "prefetch", each
        assert each["peers"] == {str(1 - each["dwdp_rank"]): "ready"}
        assert sum(each["fetched_bytes"].values()) > each["remote_expert_bytes"] > 0
        assert each["mappings"]["ranges"] > 0


def test_a_server_on_each_host(
    two_hosts: list[Host], expected: list[list[int]], model: str
) -> None:
    """`--data-parallel-rank r` on host r; each answers by itself."""
    with ExitStack() as running:
        servers = [
            running.enter_context(host.start(model, "--data-parallel-rank", str(host.number)))
            for host in two_hosts
        ]
        for host, server in zip(two_hosts, servers, strict=True):
            host.do(server.wait_until_ready)
            assert [host.do(server.tokens, each, max_tokens=12) for each in PROMPTS] == expected
        for host in two_hosts:
            check_ranks(host.ranks())


def test_one_front_end_and_a_headless_host(
    two_hosts: list[Host], expected: list[list[int]], model: str
) -> None:
    """`--headless` on the second host, whose rank the first host's server hands requests to."""
    front, other = two_hosts
    (port,) = free_ports(1)
    common = ("--data-parallel-size-local", "1", "--data-parallel-address", ADDRESSES[0])
    common = (*common, "--data-parallel-rpc-port", str(port))
    with (
        front.start(model, *common) as server,
        other.start(model, *common, "--headless", "--data-parallel-start-rank", "1") as headless,
    ):
        front.do(server.wait_until_ready)
        for rank in (0, 1):
            found = [front.do(server.tokens, each, rank=rank, max_tokens=12) for each in PROMPTS]
            assert found == expected, rank
        check_ranks(other.ranks())
        deadline = time.monotonic() + 20
        while not front.do(server.metric, "vllm:dwdp_fetched_bytes_total", engine="1"):
            assert time.monotonic() < deadline, "the front end asks the rank of the other host"
            time.sleep(0.5)
        assert headless.process.poll() is None

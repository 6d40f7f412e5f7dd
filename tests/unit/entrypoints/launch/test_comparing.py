"""A relay that compares decode servers itself, with small real servers that say what vLLM's would."""

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.helpers.waiting import wait_until
from tests.unit.entrypoints.launch.servers import served
from tests.unit.entrypoints.launch.test_pairing import Fake
from vllm_dwdp.entrypoints.launch import relay
from vllm_dwdp.entrypoints.launch.ports import free_ports

pytestmark = pytest.mark.timeout(60)


class Relay:
    """The relay's process, and what a router sees at the door that it opens."""

    def __init__(self, rank: str, decode: str, log: Path) -> None:
        self.log = log
        port, self.door = free_ports(2)
        given = ["--compare", "--decode", f"{self.door}={decode}", str(port), rank]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", relay.__name__, *given],
                stdout=output,
                stderr=output,
                env={name: value for name, value in os.environ.items() if name[:4] != "DWDP"},
            )

    def ask(self) -> tuple[int, str]:
        """Return status and content; follows nothing."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.door, timeout=20)) as connection:
            connection.request("POST", "/v1/completions", "{}")
            response = connection.getresponse()
            return response.status, response.read().decode()

    def wait_for(self, line: str) -> None:
        wait_until(lambda: line in self.log.read_text(), timeout_s=30)


@contextmanager
def relayed(rank: Fake, decode: Fake, log: Path) -> Iterator[Relay]:
    with ExitStack() as stack:
        urls = [stack.enter_context(served(each)) for each in (rank, decode)]
        made = Relay(*urls, log)
        stack.callback(made.process.wait, timeout=20)
        stack.callback(made.process.kill)
        yield made


def test_a_door_opens_to_a_server_that_fits(tmp_path: Path) -> None:
    rank, decode = Fake(), Fake()
    with relayed(rank, decode, tmp_path / "log") as made:
        made.wait_for("decode 0: fits the ranks, and gets requests")
        assert made.ask()[0] == 307
    assert len(rank.asked) == len(decode.asked) == 1
    assert decode.received > 0


def test_a_door_stays_closed_to_one_that_does_not(tmp_path: Path) -> None:
    with relayed(Fake(), Fake(block_size="64"), tmp_path / "log") as made:
        differs = "--block-size is '64' there and '32' here"
        made.wait_for("decode 0: gets no requests")
        status, content = made.ask()
        assert status == 503
        assert differs in json.loads(content)["error"]["message"]
        assert differs in made.log.read_text()

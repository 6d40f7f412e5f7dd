"""The door in front of a decode server: who is sent on, and who is refused."""

import http.client
import http.server
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.unit.entrypoints.launch.servers import Rank, served
from vllm_dwdp.entrypoints.launch import door as door_module
from vllm_dwdp.entrypoints.launch.door import DoorServer
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.relay import open_doors

pytestmark = pytest.mark.timeout(60)


class Door:
    """A door, and what a client of it sees."""

    def __init__(self, server: DoorServer) -> None:
        self.server = server

    def ask(self, method: str = "POST", **body: object) -> tuple[int, dict[str, str], str]:
        """Return status, headers and content; follows nothing."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=20)
        with closing(connection):
            connection.request(method, "/v1/completions", json.dumps(body) if body else None)
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read().decode()


@pytest.fixture
def door() -> Iterator[tuple[Door, Rank]]:
    """Yield a door, and the decode server behind it."""
    decode = Rank("decode", 200)
    with served(decode) as url:
        server = DoorServer("127.0.0.1", 0, url)
        with served(server):
            yield Door(server), decode


def test_a_door_sends_the_router_on(door: tuple[Door, Rank], say: Callable[..., None]) -> None:
    """Tokens then come from the decode server itself."""
    opened, decode = door
    for said in ({}, {opened.server.place: ["admitted", ""]}):
        say(said)
        status, headers, _ = opened.ask()
        assert status == 307
        assert headers["Location"] == f"http://127.0.0.1:{decode.server_port}/v1/completions"
        assert opened.ask("GET")[0] == 200
    assert len(decode.asked) == 4, "it was asked for its health"


@pytest.mark.parametrize(
    ("state", "reason", "told"),
    [
        ("refused", "--dtype is another one", "--dtype is another one"),
        ("gone", "", "The decode server is gone, and gets nothing."),
        ("being compared", "", "The decode server is being compared, and gets nothing."),
    ],
)
def test_a_door_refuses_what_the_server_may_not_get(
    door: tuple[Door, Rank], say: Callable[..., None], state: str, reason: str, told: str
) -> None:
    opened, decode = door
    say({opened.server.place: [state, reason]})
    status, headers, content = opened.ask()
    assert (status, headers["Retry-After"]) == (503, "5")
    error = json.loads(content)["error"]
    assert (error["message"], error["code"]) == (told, 503)
    assert opened.ask("GET")[0] == 200, "nobody else would say why"
    say({opened.server.place: [state, reason], "127.0.0.1:1": ["admitted", ""]})
    assert opened.ask("GET")[0] == 503, "the router is to choose the other one"
    assert len(decode.asked) == 1


def test_a_door_lets_pass_what_a_rank_has_computed_when_the_launch_ends(
    door: tuple[Door, Rank], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DWDP_ENDING_FILE", str(tmp_path / "ending"))
    (tmp_path / "ending").touch()
    opened, _ = door
    assert opened.ask(kv_transfer_params={"remote_host": "127.0.0.1"})[0] == 307
    for body in ({}, {"kv_transfer_params": None}):
        status, headers, content = opened.ask(**body)
        assert (status, headers["Retry-After"]) == (503, "5")
        assert json.loads(content)["error"]["message"] == "This launch ends, and takes nothing new."


def test_a_door_of_a_dead_server_sends_the_router_to_another_one(say: Callable[..., None]) -> None:
    """Before anybody says that it is gone, and afterwards."""
    nobody, other = (f"http://127.0.0.1:{port}" for port in free_ports(2))
    with served(Rank("other", 200)) as living:
        others = {"a:1": other, "a:2": living}
        server = DoorServer("127.0.0.1", 0, nobody, others)
        with served(server):
            door = Door(server)
            states = {"a:1": ["admitted", ""], "a:2": ["admitted", ""]}
            for of_its_own in ("admitted", "gone", "refused"):
                say(states | {server.place: [of_its_own, ""]})
                status, headers, _ = door.ask()
                assert (status, headers["Location"]) == (307, f"{living}/v1/completions")
            say(states | {server.place: ["admitted", ""], "a:2": ["being compared", ""]})
            status, headers, content = door.ask()
            assert (status, headers["Retry-After"]) == (503, "5")
            told = json.loads(content)["error"]["message"]
            assert told == "The decode server is gone, and gets nothing."


def test_each_door_knows_the_other_decode_servers() -> None:
    first, second = free_ports(2)
    with ExitStack() as opened:
        for door in open_doors("127.0.0.1", [(first, "http://a:1"), (second, "http://b:2")]):
            opened.enter_context(door)
            places = {f"127.0.0.1:{first}": "http://a:1", f"127.0.0.1:{second}": "http://b:2"}
            assert door.url == places.pop(door.place)
            assert door.others == places


@pytest.mark.parametrize(
    ("status", "is_slow", "passes"),
    [(200, False, True), (503, False, False), (0, False, False), (200, True, True)],
    ids=["healthy", "its engine is dead", "dies", "slow"],
)
def test_a_door_asks_for_health_before_it_sends_anything_on(
    monkeypatch: pytest.MonkeyPatch, status: int, is_slow: bool, passes: bool
) -> None:
    monkeypatch.setattr(door_module, "SERVES_TIMEOUT_S", 0.2)
    decode = Rank("decode", status)
    decode.on_request = lambda: time.sleep(0.5 * is_slow)
    with served(decode) as url, served(opened := DoorServer("127.0.0.1", 0, url)):
        assert Door(opened).ask()[0] == (307 if passes else 503)
    assert [path for path, _, _ in decode.asked] == ["/health"]

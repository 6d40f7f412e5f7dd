"""What stands between the router and ranks that die, with small real servers as ranks."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.helpers.waiting import wait_until
from tests.unit.entrypoints.launch.servers import Rank, served
from vllm_dwdp.entrypoints.launch import door as door_module
from vllm_dwdp.entrypoints.launch import fronts, hop
from vllm_dwdp.entrypoints.launch import relay as relay_module
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.relay import RelayServer, parse

pytestmark = pytest.mark.timeout(60)

Ask = Callable[..., tuple[int, dict[str, object]]]


@contextmanager
def relayed(*statuses: int | None) -> Iterator[tuple[Ask, list[Rank]]]:
    """Yield a relay in front of ranks with these statuses; None is one that nobody started."""
    with ExitStack() as opened:
        ranks, urls = [], []
        for number, status in enumerate(statuses):
            if status is None:
                urls.append(f"http://127.0.0.1:{free_ports(1)[0]}")
                continue
            ranks.append(Rank(f"rank {number}", status))
            urls.append(opened.enter_context(served(ranks[-1])))
        relay = opened.enter_context(served(RelayServer(0, urls)))

        def ask(
            method: str = "POST", body: bytes = b"the prompt", name: str = "7"
        ) -> tuple[int, dict[str, object]]:
            data = body if method == "POST" else None
            request = urllib.request.Request(
                relay + "/routed/v1/completions", data, {"X-Request-Id": name}, method=method
            )
            try:
                with urllib.request.urlopen(request, timeout=20) as response:
                    return response.status, json.loads(response.read())
            except urllib.error.HTTPError as error:
                content = error.read()
                return error.code, json.loads(content) if content.startswith(b"{") else {}

        yield ask, ranks


@pytest.mark.parametrize(
    ("statuses", "status", "by"),
    [
        ((200, 200), 200, "rank 0"),
        ((0, 200), 200, "rank 1"),
        ((None, 200), 200, "rank 1"),
        ((500, 200), 200, "rank 1"),
        ((503, 0, 200), 200, "rank 2"),
        ((400, 200), 400, "rank 0"),
        ((503, None), 503, "rank 0"),
        ((503, 503), 503, "rank 1"),
    ],
    ids=["first", "dies", "dead", "breaks", "third", "client's mistake", "ending", "all ending"],
)
def test_who_computes_a_prompt(statuses: tuple[int | None, ...], status: int, by: str) -> None:
    with relayed(*statuses) as (ask, ranks):
        assert ask() == (status, {"by": by})
        (named,) = [rank for rank in ranks if rank.name == by]
        assert named.asked == [("/routed/v1/completions", "7", b"the prompt")]


def test_a_prompt_that_no_rank_computes_is_left_to_the_decode_server() -> None:
    with relayed(0, None) as (ask, ranks):
        assert ask() == (200, {"kv_transfer_params": None})
        assert len(ranks[0].asked) == 1


def test_a_probe_of_the_relay_fails_while_it_hangs_and_not_for_dead_servers() -> None:
    """Its connections are accepted by the kernel all the while."""
    ports = free_ports(5)
    door, first, second, *dead = ports
    urls = [f"http://127.0.0.1:{port}" for port in dead]
    words = [f"--decode={door}={urls[0]}", f"{first},{second}", *urls]
    process = subprocess.Popen([sys.executable, "-m", relay_module.__name__, *words])
    alive = f"http://127.0.0.1:{first}{hop.ALIVE_PATH}"
    try:
        wait_until(lambda: fronts.answers(alive), 20)
        process.send_signal(signal.SIGSTOP)
        with socket.create_connection(("127.0.0.1", first), timeout=5):
            assert not fronts.answers(alive)
        process.send_signal(signal.SIGCONT)
        assert fronts.answers(alive)
        assert not fronts.answers(f"http://127.0.0.1:{first}/health"), "which is the rank's"
    finally:
        process.kill()
        process.wait()


def test_a_probe_of_one_port_finds_another_that_hangs() -> None:
    with RelayServer(0, ["http://127.0.0.1:1"]) as hangs:
        silent = hangs.server_port
        asked = RelayServer(0, ["http://127.0.0.1:1"])
        with served(asked) as url:
            for beside, status in (([asked, hangs], 503), ([asked], 200)):
                asked.beside = beside
                answer = hop.ask(url, "GET", hop.ALIVE_PATH, b"", {}, 10.0)
                assert answer is not None and answer.status == status
                assert (f"ports [{silent}] do not answer" in answer.body.decode()) == (
                    status == 503
                )


@pytest.mark.parametrize(("first", "status"), [(200, 200), (503, 503), (None, 503), (0, 503)])
def test_health_is_that_of_the_rank_itself(first: int | None, status: int) -> None:
    """So that the router stops choosing it."""
    with relayed(first, 200) as (ask, ranks):
        assert ask("GET")[0] == status
        assert not ranks[-1].asked


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["one", "two"]},
        {"prompt": [[1, 2], [3]]},
        {"prompt": "one", "n": 2},
        {"messages": [], "n": 2},
        {"prompt": "one", "best_of": 3},
        {"prompt": "one", "use_beam_search": True},
        {"prompt": "one", "prompt_logprobs": 0},
        {"messages": [], "prompt_logprobs": 2},
        {"prompt": "one", "echo": True, "logprobs": 1},
    ],
)
def test_what_needs_the_whole_prompt_is_left_to_the_decode_server(body: object) -> None:
    """It would decode the blocks of one prompt for several sequences, or invent log-probabilities."""
    with relayed(200) as (ask, ranks):
        assert ask(body=json.dumps(body).encode()) == (200, {"kv_transfer_params": None})
        assert not ranks[0].asked


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [1, 2]},
        {"prompt": ["one"]},
        {"prompt": "one", "n": 1, "best_of": None},
        {"echo": False, "prompt_logprobs": None},
        3,
    ],
)
def test_what_stays_one_sequence_is_computed_by_a_rank(body: object) -> None:
    with relayed(200) as (ask, _):
        assert ask(body=json.dumps(body).encode()) == (200, {"by": "rank 0"})


def test_nothing_new_is_taken_once_the_launch_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The router chooses no rank any more; what it had sent to one is refused at the door."""
    monkeypatch.setenv("DWDP_ENDING_FILE", str(tmp_path / "ending"))
    with relayed(200, None) as (ask, ranks):
        assert ask()[0] == 200
        (tmp_path / "ending").touch()
        assert ask() == (200, {"kv_transfer_params": None}) and ask("GET")[0] == 503
        assert len(ranks[0].asked) == 1


def test_a_rank_that_refuses_because_the_launch_ends_leaves_the_refusal_to_the_door(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DWDP_ENDING_FILE", str(tmp_path / "ending"))
    with relayed(503) as (ask, ranks):
        ranks[0].on_request = (tmp_path / "ending").touch
        assert ask() == (200, {"kv_transfer_params": None})
        assert len(ranks[0].asked) == 1


def test_it_listens_where_it_is_told_to() -> None:
    (port,) = free_ports(1)
    with RelayServer(port, [], parse(["--host", "127.0.0.2", str(port), "http://x"]).host) as relay:
        assert relay.server_address == ("127.0.0.2", port)
    assert parse([str(port), "http://x"]).host == "127.0.0.1"


def test_each_door_is_a_port_and_a_url() -> None:
    given = parse(["--decode", "9=http://a:1", "--decode", "8=http://b:2", "7", "http://rank0:3"])
    assert given.decode == [(9, "http://a:1"), (8, "http://b:2")]
    assert (given.ports, given.urls) == ([7], ["http://rank0:3"])


def test_every_rank_has_a_port(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["8000,8001", "http://rank0:8000"])
    assert "2 ports for 1 ranks: each rank has one port" in capsys.readouterr().err


FOR_DECODE = "___prefill_addr_127.0.0.1:1/routed___decode_addr_127.0.0.1:2_" + 32 * "a"


def test_a_prompt_for_a_decode_server_that_is_being_compared_waits(
    say: Callable[..., None],
) -> None:
    say({"127.0.0.1:2": ["being compared", ""], "127.0.0.1:3": ["gone", ""]})
    with relayed(200) as (ask, ranks), ThreadPoolExecutor(1) as pool:
        waits = pool.submit(ask, name=FOR_DECODE)
        assert (
            ask(name="7") == ask(name=FOR_DECODE.replace(":2_", ":4_")) == (200, {"by": "rank 0"})
        )
        time.sleep(0.3)
        assert not waits.done() and len(ranks[0].asked) == 2
        say({"127.0.0.1:2": ["admitted", ""]})
        assert waits.result(timeout=20) == (200, {"by": "rank 0"})


@pytest.mark.parametrize("state", ["refused", "gone", "being compared"])
def test_a_prompt_for_a_decode_server_that_may_not_get_it_is_not_computed(
    say: Callable[..., None], monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(door_module, "HOLD_S", {"gone": 0.1})
    monkeypatch.setattr(door_module, "LONGEST_HOLD_S", 0.1)
    say({"127.0.0.1:2": [state, ""]})
    with relayed(200) as (ask, ranks):
        assert ask(name=FOR_DECODE) == (200, {"kv_transfer_params": None})
        assert not ranks[0].asked


def test_a_prompt_is_computed_while_another_decode_server_gets_requests(
    say: Callable[..., None],
) -> None:
    say({"127.0.0.1:2": ["gone", ""], "127.0.0.1:3": ["admitted", ""]})
    with relayed(200) as (ask, _):
        assert ask(name=FOR_DECODE) == (200, {"by": "rank 0"})

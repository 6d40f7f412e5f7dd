"""What knocks at a rank beside its peers: crowds, slow writers, other users."""

import multiprocessing
import os
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import pytest

from tests.multiprocess.members import publish, rank
from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.meeting import make_abstract_endpoint
from vllm_dwdp.distributed.status import query_status
from vllm_dwdp.errors import (
    JoinTimeoutError,
    RendezvousError,
)

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("nothing_leaks"),
]


def test_nonsense_slow_writers_and_crowds_do_not_stop_the_answers(endpoint: Endpoint) -> None:
    member = rank(endpoint, 0)
    member.describe_by(lambda: {"ok": True})
    idle = []
    for _ in range(50):
        connection = endpoint.connect(0, 0, timeout_s=1)
        assert connection is not None
        idle.append(connection)
    for nonsense in (b"\x00", b"\xff" * 500, b"\xdf\x7f\xff\xff\xff" * 8, b"\xc6" + b"\xff" * 4):
        connection = endpoint.connect(0, 0, timeout_s=1)
        assert connection is not None
        connection.send(nonsense)
        connection.close()
    assert query_status(endpoint, 0, 0, timeout_s=5)["ok"]
    for connection in idle:
        connection.close()
    member.close()


def test_a_crowd_is_turned_away_and_the_rank_recovers(endpoint: Endpoint) -> None:
    member = rank(endpoint, 0)
    member.describe_by(lambda: {"ok": True})
    crowd = [endpoint.connect(0, 0, timeout_s=0.0) for _ in range(2_000)]
    for connection in crowd:
        if connection is not None:
            connection.close()
    deadline = time.monotonic() + 10
    while True:
        try:
            assert query_status(endpoint, 0, 0, timeout_s=2)["ok"]
            break
        except (RendezvousError, OSError):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    member.close()


def test_a_rank_with_a_crowd_before_its_door_is_not_dead(endpoint: Endpoint) -> None:
    """Its backlog is full because it is stopped: it must not lose its place to a second one."""
    listener = endpoint.listen(0, 1)
    crowd = []
    while (connection := endpoint.connect(0, 1, timeout_s=0.0)) is not None:
        crowd.append(connection)
    assert endpoint.listening(0, [0, 1], 1.0) == {1}
    with pytest.raises(RendezvousError, match="rank 1 of group 0 is already running"):
        endpoint.listen(0, 1)
    started = time.monotonic()
    assert endpoint.connect(0, 1, timeout_s=0.5) is None
    assert 0.5 <= time.monotonic() - started < 2
    for connection in crowd:
        connection.close()
    listener.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_turned_away() -> None:
    """An abstract name has no folder to hide behind: the uid of the caller decides."""
    endpoint = make_abstract_endpoint()
    member = rank(endpoint, 0)
    member.describe_by(lambda: {"secret": 1})
    stranger = multiprocessing.get_context("fork").Process(target=as_nobody, args=(endpoint,))
    stranger.start()
    stranger.join()
    assert stranger.exitcode == 0, "a foreign uid got an answer"
    assert query_status(endpoint, 0, 0, timeout_s=5)["secret"] == 1
    stranger.close()
    member.close()


def as_nobody(endpoint: Endpoint) -> None:
    os.setuid(65534)
    try:
        query_status(endpoint, 0, 0, timeout_s=2)
    except (OSError, RendezvousError):
        os._exit(0)
    os._exit(1)


def test_another_user_that_takes_a_ranks_name_is_no_peer() -> None:
    """Abstract names can be read in /proc/net/unix: what listens there must be ours as well."""
    endpoint = make_abstract_endpoint()
    context = multiprocessing.get_context("fork")
    listens, done = context.Event(), context.Event()
    stranger = context.Process(target=listen_as_nobody, args=(endpoint, listens, done))
    stranger.start()
    assert listens.wait(10)
    member = rank(endpoint, 0, join_timeout_s=0.5)
    fd = publish(member)
    with pytest.raises(JoinTimeoutError, match=r"user id 65534 listens as rank 1 of group 0"):
        member.meet()
    done.set()
    stranger.join()
    stranger.close()
    member.close()
    os.close(fd)


def listen_as_nobody(endpoint: Endpoint, listens: Any, done: Any) -> None:
    os.setuid(65534)
    member = rank(endpoint, 1)
    publish(member)
    member.announce_ready(b"digest")
    listens.set()
    done.wait(20)
    os._exit(0)


def test_a_peer_that_trickles_its_answer_holds_nobody_up(endpoint: Endpoint) -> None:
    """Each packet comes in time, the whole never: the exchange has a deadline, and so has the wait."""
    listener = endpoint.listen(0, 1)
    listener.setblocking(True)
    stop = threading.Event()
    trickler = threading.Thread(target=trickle, args=(listener, stop))
    trickler.start()
    member = rank(endpoint, 0, join_timeout_s=1.0)
    fd = publish(member)
    started = time.monotonic()
    with pytest.raises(JoinTimeoutError, match="longer than its deadline|timed out"):
        member.meet()
    assert time.monotonic() - started < 4
    stop.set()
    trickler.join()
    listener.close()
    member.close()
    os.close(fd)


def trickle(listener: socket.socket, stop: threading.Event) -> None:
    """Announce a shard of many handles, and send one fabric handle at a time."""
    listener.settimeout(0.1)
    while not stop.is_set():
        with suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(5)
                connection.recv(2**17)
                count = messages.MAX_HANDLES
                header = messages.Shard(1, 1, (1,) * count, b"", b"", False, 0, count)
                connection.send(messages.encode(header))
                while not stop.wait(0.2):
                    connection.send(messages.encode(messages.Handles(0, (b"f" * 64,))))

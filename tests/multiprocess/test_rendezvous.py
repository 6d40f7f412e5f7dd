"""Ranks that meet: real sockets, real processes, real deaths."""

import multiprocessing
import os
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.files import num_open_files
from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.distributed import dialling, messages, waiting
from vllm_dwdp.distributed.dialling import Dialler
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.meeting import make_abstract_endpoint, parse_endpoint
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.distributed.status import query_status
from vllm_dwdp.distributed.unix import UnixEndpoint
from vllm_dwdp.errors import (
    DwdpConfigError,
    JoinTimeoutError,
    PeerMismatchError,
    ProtocolError,
    RendezvousError,
)

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(60)]


@pytest.fixture(params=["abstract", "unix"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Endpoint:
    if request.param == "abstract":
        return make_abstract_endpoint()
    return parse_endpoint(f"unix://{tmp_path}/meet")


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    resource_tracker.ensure_running()  # multiprocessing's own descriptor, opened once
    before = num_open_files(), threading.active_count()
    yield
    assert (num_open_files(), threading.active_count()) == before


def rank(endpoint: Endpoint, number: int, size: int = 2, **options: Any) -> Membership:
    return Membership.join(
        endpoint,
        group=0,
        dwdp_rank=number,
        group_size=size,
        fingerprint=options.pop("fingerprint", fingerprint()),
        join_timeout_s=options.pop("join_timeout_s", 10.0),
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def publish(member: Membership) -> int:
    fd = os.memfd_create(f"dwdp-{member.dwdp_rank}")
    os.write(fd, b"%d" % member.dwdp_rank)
    member.publish([fd], [4096])
    return fd


def test_three_ranks_exchange_shards_and_readiness(endpoint: Endpoint) -> None:
    members = [rank(endpoint, number, 3) for number in range(3)]
    fds = [publish(member) for member in members]
    with ThreadPoolExecutor(3) as pool:
        shards = list(pool.map(lambda member: member.meet(), members))
        for member, met in zip(members, shards, strict=True):
            assert sorted(met) == sorted(member.peer_ranks)
            for peer, shard in met.items():
                assert os.pread(shard.fds[0], 1, 0) == b"%d" % peer
                assert not shard.ready
                shard.close()
            member.announce_ready(b"digest")
        list(pool.map(lambda member: member.wait_ready(), members))
    assert {state.state for state in members[0].peers().values()} == {"ready"}
    members[2].close()
    assert members[0].peers()[2].state == "dead"
    for member, fd in zip(members, fds, strict=True):
        member.close()
        os.close(fd)
    if isinstance(endpoint, UnixEndpoint):
        assert not list(Path(endpoint.location).iterdir())


def test_missing_ranks_are_named_at_the_deadline(endpoint: Endpoint) -> None:
    member = rank(endpoint, 1, 4, join_timeout_s=0.3)
    fd = publish(member)
    with pytest.raises(
        JoinTimeoutError,
        match=r"ranks \[0, 2, 3\] of group 0 did not publish .* join_timeout_s=0.3",
    ):
        member.meet()
    member.close()
    os.close(fd)


def test_a_mismatch_is_refused_on_both_sides_with_the_fields(endpoint: Endpoint) -> None:
    first = rank(endpoint, 0)
    fd = publish(first)
    texts = []
    with pytest.raises(PeerMismatchError) as caught:
        rank(endpoint, 1, fingerprint=fingerprint(dtype="fp16", quantization="fp8"))
    texts.append(str(caught.value))
    with pytest.raises(PeerMismatchError) as caught:
        first.meet()
    texts.append(str(caught.value))
    for text in texts:
        assert "quantization is" in text
        assert "dtype is" in text
        assert "config_digest" not in text
    first.close()
    os.close(fd)


def test_a_rank_that_gives_up_tells_the_others_why(endpoint: Endpoint) -> None:
    waiting = rank(endpoint, 0)
    fd = publish(waiting)
    with pytest.raises(MemoryError), rank(endpoint, 1):
        raise MemoryError("no room for 3 experts")
    with pytest.raises(
        RendezvousError, match="rank 1 of group 0 failed to start: MemoryError: no room for 3"
    ):
        waiting.meet()
    waiting.close()
    os.close(fd)


def test_one_rank_cannot_run_twice(endpoint: Endpoint) -> None:
    member = rank(endpoint, 0)
    with pytest.raises(RendezvousError, match="rank 0 of group 0 is already running"):
        rank(endpoint, 0)
    member.close()


def test_a_closing_rank_cannot_forget_its_successor(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removes its socket's name while it still listens: until then nobody takes its place."""
    member, listened = rank(endpoint, 0), []
    unlink = os.unlink

    def look_and_unlink(path: str) -> None:
        listened.append(endpoint.listening(0, [0], 1.0))
        unlink(path)

    monkeypatch.setattr(os, "unlink", look_and_unlink)
    member.close()
    assert listened == ([{0}] if isinstance(endpoint, UnixEndpoint) else [])


def test_status_is_answered_at_any_time(endpoint: Endpoint) -> None:
    member = rank(endpoint, 0)
    member.describe_by(lambda: {"mode": "direct", "steps": {"direct": 7}})
    assert query_status(endpoint, 0, 0, timeout_s=5)["steps"] == {"direct": 7}
    member.close()
    with pytest.raises(RendezvousError, match="does not listen"):
        query_status(endpoint, 0, 0, timeout_s=5)


def test_a_wait_for_silent_peers_is_told_before_the_first_answers(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They listen and never answer, as stopped ones do; a round of questions takes its time."""
    monkeypatch.setattr(dialling, "REPLY_TIMEOUT_S", 0.5)
    monkeypatch.setattr(waiting, "WAITING_NOTICE_S", 0.2)
    said: list[str] = []
    monkeypatch.setattr(waiting.logger, "info", lambda text, *words: said.append(text % words))
    silent = [endpoint.listen(0, number) for number in (1, 2, 3)]
    member = rank(endpoint, 0, 4, join_timeout_s=4.0)
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(member.meet)
        time.sleep(0.3)
        status = query_status(endpoint, 0, 0, timeout_s=5)
        with pytest.raises(JoinTimeoutError):
            meeting.result()
    member.close()
    for listener in silent:
        listener.close()
    waits = r"waits for ranks \[1, 2, 3\] to publish their experts \(\d s of 4 s\)"
    assert re.fullmatch(waits, status["doing"])
    assert len(said) >= 4, "not only once a round, of nine questions"
    for line in said:
        assert re.fullmatch(f"DWDP rank 0 of group 0 {waits}", line)


def test_a_stale_generation_is_refused(endpoint: Endpoint) -> None:
    keeper, seen = rank(endpoint, 0), rank(endpoint, 1)
    fd = publish(keeper)
    seen.close()
    stale = Dialler(endpoint, group=0, dwdp_rank=1, group_size=2, fingerprint=fingerprint())
    stale.generation = seen.generation - 1
    with pytest.raises(PeerMismatchError, match="is stale"):
        stale.fetch(0, 0)
    keeper.close()
    os.close(fd)


def test_the_shard_of_a_dead_rank_comes_from_whoever_holds_it(endpoint: Endpoint) -> None:
    """Ranks 1 and 2 die; 2 returns alone, and finds its own shard and rank 1's at rank 0."""
    members = [rank(endpoint, number, 3) for number in range(3)]
    fds = [publish(member) for member in members]
    meet_all(members)
    for victim in (1, 2):
        members[victim].close()
        os.close(fds[victim])
    returned = rank(endpoint, 2, 3)
    own = next(returned.recover())
    assert os.pread(own.fds[0], 1, 0) == b"2"
    assert own.digest == b"digest"
    returned.publish(own.fds, own.handle_bytes)
    shards = returned.meet()
    assert os.pread(shards[1].fds[0], 1, 0) == b"1"
    assert os.pread(shards[0].fds[0], 1, 0) == b"0"
    returned.announce_ready(own.digest)
    returned.wait_ready()
    assert {peer: state.state for peer, state in returned.peers().items()} == {
        0: "ready",
        1: "dead",
    }
    assert members[0].peers()[2].generation == returned.generation
    for shard in (own, *shards.values()):
        shard.close()
    returned.close()
    members[0].close()
    os.close(fds[0])


def test_a_shard_of_hundreds_of_descriptors_is_handed_over_and_lent(endpoint: Endpoint) -> None:
    """As a CUDA shard is: 700 descriptors of a rank, also to one that comes while it is dead."""
    members = [rank(endpoint, number, 3) for number in range(3)]
    pages = [os.memfd_create(f"page-{number}") for number in range(700)]
    inodes = [os.fstat(page).st_ino for page in pages]
    fabric = [number.to_bytes(64, "big") for number in range(700)]
    for member in members:
        member.publish(pages, [4096] * 700, fabric)
    meet_all(members)
    members[1].close()
    members[2].close()
    returned = rank(endpoint, 2, 3)
    for shard in (next(returned.recover()), *(met := returned.meet()).values()):
        assert [os.fstat(fd).st_ino for fd in shard.fds] == inodes
        assert list(shard.fabric_handles) == fabric
        assert not any(os.get_inheritable(fd) for fd in shard.fds)
        shard.close()
    assert sorted(met) == [0, 1]
    returned.close()
    members[0].close()
    messages.close_all(pages)


def test_a_shard_of_too_many_handles_is_refused_where_it_is_made(endpoint: Endpoint) -> None:
    member = rank(endpoint, 0)
    with pytest.raises(RendezvousError, match="has 8193 memory handles; at most 8192"):
        member.publish([], [4096], [b"f" * 64] * 8193)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    page = os.memfd_create("page")
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    try:
        with pytest.raises(RendezvousError, match="duplicating 700 descriptors .*ulimit -n"):
            member.publish([page] * 700, [4096] * 700)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    os.close(page)
    member.close()


def test_a_peer_that_restarts_before_it_was_ready_is_mapped_anew(endpoint: Endpoint) -> None:
    """Its first shard never becomes whole; going on with that one would be silently wrong."""
    members = [rank(endpoint, number) for number in range(2)]
    fds = [publish(member) for member in members]
    for shard in members[0].meet().values():
        shard.close()
    members[1].close()
    reborn = rank(endpoint, 1)
    assert not list(reborn.recover())
    new = os.memfd_create("second life")
    os.write(new, b"2")
    reborn.publish([new], [4096])
    reborn.announce_ready(b"digest")
    (replaced,) = members[0].wait_ready().values()
    assert (replaced.rank, replaced.generation) == (1, reborn.generation)
    assert os.pread(replaced.fds[0], 1, 0) == b"2"
    replaced.close()
    for member in (reborn, members[0]):
        member.close()
    messages.close_all([*fds, new])


def test_a_peer_that_dies_once_it_was_ready_is_vouched_for_by_another(endpoint: Endpoint) -> None:
    members = [rank(endpoint, number, 3) for number in range(3)]
    fds = [publish(member) for member in members]
    for member in members:
        for shard in member.meet().values():
            shard.close()
        member.announce_ready(b"digest")
    members[1].wait_ready()
    members[2].close()
    assert members[0].wait_ready() == {}
    for member in members[:2]:
        member.close()
    messages.close_all(fds)


def test_the_group_keeps_its_limit_when_ranks_die_and_return(endpoint: Endpoint) -> None:
    """The least that was proposed; a rank that returns measures alone, and that counts for nothing."""
    members = [rank(endpoint, number, 3) for number in range(3)]
    fds = [publish(member) for member in members]
    for member, limit in zip(members, (90, 64, 77), strict=True):
        member.propose_limit(limit)
    meet_all(members)
    assert [member.agree_on_limit() for member in members] == [64] * 3
    for victim in (1, 2):
        members[victim].close()
    returned = rank(endpoint, 2, 3)
    own = next(returned.recover())
    returned.publish(own.fds, own.handle_bytes)
    returned.propose_limit(5)
    for shard in (own, *returned.meet().values()):
        shard.close()
    returned.announce_ready(own.digest)
    returned.wait_ready()
    assert returned.agree_on_limit() == 64
    for member in (returned, members[0]):
        member.close()
    messages.close_all(fds)


def test_what_was_agreed_with_a_peers_earlier_start_is_heard_of(endpoint: Endpoint) -> None:
    """Rank 0 has decided with rank 2, which starts again before rank 1 has heard of it."""
    members = [rank(endpoint, number, 3) for number in range(3)]
    fds = [publish(member) for member in members]
    for member, limit in zip(members, (40, 60, 10), strict=True):
        for shard in member.meet().values():
            shard.close()
        member.propose_limit(limit)
    for member in members[:2]:
        member.announce_ready(b"digest")
    assert members[1]._exchange._is_ready(0, {}), "with what it proposes, not with what is agreed"
    members[2].announce_ready(b"digest")
    members[0].wait_ready()
    assert members[0].agree_on_limit() == 10
    members[2].close()
    reborn = rank(endpoint, 2, 3)
    fds.append(publish(reborn))
    reborn.propose_limit(50)
    for shard in reborn.meet().values():
        shard.close()
    reborn.announce_ready(b"digest")
    for shard in members[1].wait_ready().values():
        shard.close()
    reborn.wait_ready()
    assert members[1].agree_on_limit() == reborn.agree_on_limit() == 10
    for member in (*members[:2], reborn):
        member.close()
    messages.close_all(fds)


def meet_all(members: list[Membership]) -> None:
    with ThreadPoolExecutor(len(members)) as pool:
        for shards in pool.map(lambda member: member.meet(), members):
            for shard in shards.values():
                shard.close()
        for member in members:
            member.announce_ready(b"digest")
        list(pool.map(lambda member: member.wait_ready(), members))


def test_a_shard_that_was_never_whole_is_not_lent(endpoint: Endpoint) -> None:
    members = [rank(endpoint, number) for number in range(2)]
    fds = [publish(member) for member in members]
    for shard in members[0].meet().values():
        shard.close()
    members[1].close()
    returned = rank(endpoint, 1)
    assert not list(returned.recover())
    for member in (returned, members[0]):
        member.close()
    for fd in fds:
        os.close(fd)


def test_a_rank_that_returns_with_another_checkpoint_is_refused(endpoint: Endpoint) -> None:
    members = [rank(endpoint, number) for number in range(2)]
    fds = [publish(member) for member in members]
    meet_all(members)
    members[1].close()
    with pytest.raises(PeerMismatchError, match="checkpoint_digest is"):
        rank(endpoint, 1, fingerprint=fingerprint(checkpoint_digest="flipped"))
    assert members[0].peers()[1].state in ("ready", "dead"), "the survivor goes on"
    members[0].close()
    for fd in fds:
        os.close(fd)


def run_rank(location: str, number: int) -> None:
    member = rank(parse_endpoint(location), number)
    publish(member)
    for shard in member.meet().values():
        shard.close()
    time.sleep(60)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stopped_rank_delays_nobody(endpoint: Endpoint, sent: signal.Signals) -> None:
    """kill -9 shows as dead, and its socket is taken over; SIGSTOP holds nobody up."""
    spawn = multiprocessing.get_context("spawn")
    peer = spawn.Process(target=run_rank, args=(str(endpoint), 1))
    peer.start()
    member = rank(endpoint, 0, join_timeout_s=30)
    fd = publish(member)
    (shard,) = member.meet().values()
    assert peer.pid is not None
    os.kill(peer.pid, sent)
    started = time.monotonic()
    if sent == signal.SIGKILL:
        peer.join()
        assert member.peers()[1].state == "dead"
        successor = rank(endpoint, 1)
        assert member.peers()[1].state != "dead"
        successor.close()
    else:
        member.peers()
        assert os.pread(shard.fds[0], 1, 0) == b"1", "what was handed over stays readable"
        peer.kill()
        peer.join()
    assert time.monotonic() - started < 5
    shard.close()
    member.close()
    os.close(fd)
    peer.close()


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


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(RendezvousError, match=r"mode 0755; .* chmod 700"):
        rank(parse_endpoint(f"unix://{folder}"), 0)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RendezvousError, match="cannot be made"):
        rank(parse_endpoint(f"unix://{tmp_path}/file/meet"), 0)


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RendezvousError, match="short path"):
        rank(parse_endpoint(f"unix://{tmp_path}/{'x' * 120}"), 0)


@pytest.mark.parametrize("text", ["unix://relative", "/tmp/x", "abstract:", "http://x", ""])
def test_other_places_are_no_meeting_place(text: str) -> None:
    with pytest.raises(DwdpConfigError, match="is not a meeting place; use unix:///"):
        parse_endpoint(text)


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


def test_a_clock_that_was_set_back_does_not_keep_a_rank_out(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [rank(endpoint, number) for number in range(2)]
    fds = [publish(member) for member in members]
    meet_all(members)
    members[1].close()
    an_hour_ago = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: an_hour_ago)
    returned = rank(endpoint, 1)
    assert returned.returning.seen_generation == members[1].generation
    assert returned.generation == members[1].generation + 1
    own = next(returned.recover())
    returned.publish(own.fds, own.handle_bytes)
    for shard in (own, *returned.meet().values()):
        shard.close()
    assert members[0].peers()[1].generation == returned.generation
    for member in (returned, members[0]):
        member.close()
    messages.close_all(fds)


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


def test_a_shard_must_come_in_as_many_handles_as_it_has_pieces(endpoint: Endpoint) -> None:
    members = [rank(endpoint, number, join_timeout_s=0.5) for number in range(2)]
    page = os.memfd_create("page")
    members[1].publish([page], [4096, 4096])
    before = num_open_files()
    with pytest.raises(ProtocolError, match="1 descriptors .* shard in 2 pieces"):
        members[0].meet()
    assert num_open_files() == before
    for member in members:
        member.close()
    os.close(page)

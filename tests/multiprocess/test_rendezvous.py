"""Ranks that meet: real sockets, real processes."""

import os
import re
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.files import num_open_files
from tests.multiprocess.members import meet_all, publish, rank
from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.distributed import dialling, messages, waiting
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.status import query_status
from vllm_dwdp.distributed.unix import UnixEndpoint
from vllm_dwdp.errors import (
    JoinTimeoutError,
    PeerMismatchError,
    ProtocolError,
    RendezvousError,
)

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("nothing_leaks"),
]


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
